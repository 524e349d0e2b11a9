"""Mapped pages whose life is that of the last view of them.

The mmap module's objects keep a descriptor each and cannot change a mapping in place, so this file asks libc. It
is the only one that uses ctypes.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import sys
import time
import weakref
from typing import Any, Dict, Optional, Protocol

from ._errors import ProtocolError

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
_MADV_COLLAPSE = 25
_F_GET_SEALS = 1034
_F_SEAL_SHRINK = 0x0002
_F_SEAL_WRITE = 0x0008
_F_SEAL_FUTURE_WRITE = 0x0010

#: A huge page. Tensors from `HUGE_MIN_BYTES` on get them, in steps after which the clock is looked at: on memory that
#: the machine had not touched before, collapsing can cost more than it saves.
_HUGE_BYTES = 2 << 20
HUGE_MIN_BYTES = 4 << 20
_STEP_BYTES = 8 << 20
_STEP_SECONDS_MAX = 0.05
_SECONDS_MAX_PER_BYTE = 0.002 / (1 << 20)


class Owner(Protocol):
    """Who is told when pages go. It is called from whatever thread that happens in, so it must take no lock."""

    def leaving(self) -> None:
        """The last view is gone; the pages are still mapped."""

    def left(self) -> None:
        """The pages are unmapped."""


#: What this process has mapped and views of, by address.
_live: Dict[int, "Pages"] = {}


class Pages:
    """A segment's place in this process.

    It does not keep the pages: views do. When the last view is gone they are unmapped.

    A forked child has the same pages. What is read-only shows it the same values as its parent, for as long as it has
    views of it: the parent does not release what was `inherited`, so that the host does not write to it again. What is
    writable becomes the child's own: else it could write to what its parent publishes, and would keep the host from
    sealing it.
    """

    def __init__(self, fd: int, length: int, writable: bool) -> None:
        size = os.fstat(fd).st_size
        if not 0 < length <= size:
            raise ProtocolError(f"a segment of {length} bytes whose descriptor has {size}")
        self.length = length
        self.address = _map(None, length, writable, fd)
        #: Of a segment that is still written to here; these pages close it.
        self.fd: Optional[int] = None
        #: Whether this process forked while it had them.
        self.inherited = False
        self._process = os.getpid()

    @classmethod
    def readonly(cls, fd: int, length: int, writers: str) -> "Pages":
        """Maps a sealed segment or a result, once Linux vouches for what the host said of it."""
        needed = {"none": _F_SEAL_WRITE, "host": _F_SEAL_FUTURE_WRITE, "worker": _F_SEAL_FUTURE_WRITE}.get(writers)
        if needed is None:
            raise ProtocolError(f"a segment to be read that can still be written to (writers: {writers!r}); it has to be published first")
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
        # Without SHRINK a shorter file would turn reads into SIGBUS.
        if not seals & _F_SEAL_SHRINK or not seals & (needed | _F_SEAL_WRITE):
            raise ProtocolError(f"a segment with the writers {writers!r} whose descriptor has the seals {seals:#x}")
        return cls(fd, length, False)

    def lend(self, owner: Owner) -> memoryview:
        """The first view, to which the pages belong from now on. It is writable if `fd` was set."""
        # numpy, pyarrow and memoryview hold this object, not the `Pages`.
        buffer = (ctypes.c_char * self.length).from_address(self.address)
        self._owner = owner
        self._buffer = weakref.ref(buffer, self._gone)
        _live[self.address] = self
        view = memoryview(buffer).cast("B")
        return view.toreadonly() if self.fd is None else view

    def _gone(self, _: Any = None) -> None:
        """The last view is gone. At the end of the process all is left to Linux."""
        # As soon as they are unmapped another thread may map something there.
        if sys is None or sys.is_finalizing() or _live.pop(self.address, None) is not self:
            return
        own = os.getpid() == self._process
        # An interrupt (Ctrl-C) may come anywhere.
        try:
            if own:
                self._owner.leaving()
        finally:
            try:
                _LIBC.munmap(self.address, self.length)
                self._close_fd()
            finally:
                if own:
                    self._owner.left()

    def collapse(self, offset: int, length: int) -> int:
        """Puts huge pages under a range that is still empty, as far as it has whole ones, and returns for how many bytes.

        Filling it then takes a fault for each 2 MiB instead of each 4 KiB, and so does everybody who maps it. Where
        Linux or the clock is against it, pages stay as they are.
        """
        start = -(-(self.address + offset) // _HUGE_BYTES) * _HUGE_BYTES
        end = (self.address + offset + length) // _HUGE_BYTES * _HUGE_BYTES
        done, begin = 0, time.monotonic()
        while start < end:
            step_begin = time.monotonic()
            step = min(_STEP_BYTES, end - start)
            for page in range(start, start + step, _HUGE_BYTES):
                # Of a range without any page Linux makes none.
                ctypes.memset(page, 0, 1)
            if _LIBC.madvise(start, step, _MADV_COLLAPSE) != 0:
                break
            start += step
            done += step
            now = time.monotonic()
            if now - step_begin > _STEP_SECONDS_MAX or now - begin > _SECONDS_MAX_PER_BYTE * done:
                break
        return done

    def end_writing(self) -> None:
        """Replaces the mapping in place by one that cannot write to the segment.

        It is a private one: views that were handed out as writable still are, and must not crash the process;
        what is written through them from now on goes to pages of this process alone.
        """
        if self.fd is not None:
            _map(self.address, self.length, True, self.fd)
            self._close_fd()

    def _close_fd(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


def sweep() -> None:
    """Unmaps what nobody has views of: an interrupt can keep Python from telling so."""
    for pages in list(_live.values()):
        if pages._buffer() is None:
            pages._gone()


def _before_fork() -> None:
    for pages in list(_live.values()):
        pages.inherited = True


def _after_fork_in_child() -> None:
    for pages in list(_live.values()):
        pages.end_writing()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


def _map(at: Optional[int], length: int, writable: bool, fd: int) -> int:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    if at is not None:
        ways = [mmap.MAP_PRIVATE | _MAP_FIXED]
    elif writable:
        ways = [mmap.MAP_SHARED]
    else:
        # Some Linux versions refuse to share a write-sealed memfd.
        ways = [mmap.MAP_SHARED, mmap.MAP_PRIVATE]
    reserved = _reserve(length) if at is None and length >= HUGE_MIN_BYTES else None
    for flags in ways:
        if reserved is not None:
            at, flags = reserved, flags | _MAP_FIXED
        address = _LIBC.mmap(at, length, protection, flags, fd, 0)
        if address != _MAP_FAILED and address is not None:
            return int(address)
    errno = ctypes.get_errno()
    if reserved is not None:
        _LIBC.munmap(reserved, length)
    raise OSError(errno, f"cannot map a segment of {length} bytes: {os.strerror(errno)}")


def _reserve(length: int) -> Optional[int]:
    """An address range aligned to huge pages: file and memory must have the same phase. None if there is none."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    length = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
    found = _LIBC.mmap(None, length + _HUGE_BYTES, _PROT_NONE, flags, -1, 0)
    if found == _MAP_FAILED or found is None:
        return None
    start = -(-found // _HUGE_BYTES) * _HUGE_BYTES
    if start > found:
        _LIBC.munmap(found, start - found)
    _LIBC.munmap(start + length, found + _HUGE_BYTES - start)
    return int(start)
