"""Mapped pages whose life is that of the last view of them.

The mmap module's objects keep a descriptor each and cannot change a mapping in place, so this file asks libc. It
is the only one that uses ctypes.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from typing import Optional, Protocol

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
_MADV_DONTFORK = 10
_F_GET_SEALS = 1034
_F_SEAL_SHRINK = 0x0002
_F_SEAL_WRITE = 0x0008
_F_SEAL_FUTURE_WRITE = 0x0010


class Owner(Protocol):
    """Who is told when pages go. It is called from whatever thread that happens in, so it must take no lock."""

    def leaving(self) -> None:
        """The last view is gone; the pages are still mapped."""

    def left(self) -> None:
        """The pages are unmapped."""


class Pages:
    """A segment's place in this process.

    It does not keep the pages: views do. When the last view is gone they are unmapped.
    """

    def __init__(self, fd: int, length: int, writable: bool) -> None:
        size = os.fstat(fd).st_size
        if not 0 < length <= size:
            raise ProtocolError(f"a segment of {length} bytes whose descriptor has {size}")
        self.length = length
        self.writable = writable
        self.address = _map(None, length, writable, fd)
        self._buffer: Optional[weakref.ref[ctypes.Array[ctypes.c_char]]] = None

    @classmethod
    def readonly(cls, fd: int, length: int, seal: str) -> "Pages":
        """Maps a sealed segment or a result, once Linux vouches for what the host said of it."""
        needed = {"write": _F_SEAL_WRITE, "host-write": _F_SEAL_FUTURE_WRITE}.get(seal)
        if needed is None:
            raise ProtocolError(f"a segment to be read whose seal is {seal!r}: somebody else can still write to it")
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
        # Without SHRINK a shorter file would turn reads into SIGBUS.
        if not seals & _F_SEAL_SHRINK or not seals & (needed | _F_SEAL_WRITE):
            raise ProtocolError(f"a segment with seal {seal!r} whose descriptor has the seals {seals:#x}")
        return cls(fd, length, False)

    def lend(self, owner: Owner) -> memoryview:
        """The first view, to which the pages belong from now on."""
        # numpy, pyarrow and memoryview hold this object, not the `Pages`.
        buffer = (ctypes.c_char * self.length).from_address(self.address)
        weakref.finalize(buffer, _unmap, self.address, self.length, os.getpid(), owner).atexit = False
        self._buffer = weakref.ref(buffer)
        view = memoryview(buffer).cast("B")
        return view if self.writable else view.toreadonly()

    def view(self) -> Optional[memoryview]:
        """Another view, read-only; None when the last one is gone."""
        buffer = None if self._buffer is None else self._buffer()
        return None if buffer is None else memoryview(buffer).cast("B").toreadonly()

    def end_writing(self, fd: int) -> None:
        """Replaces the mapping in place by one that cannot write to the segment.

        It is a private one: views that were handed out as writable still are, and must not crash the process;
        what is written through them from now on goes to pages of this process alone.
        """
        _map(self.address, self.length, True, fd)
        self.writable = False


def _map(at: Optional[int], length: int, writable: bool, fd: int) -> int:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    if at is not None:
        ways = [mmap.MAP_PRIVATE | _MAP_FIXED]
    elif writable:
        ways = [mmap.MAP_SHARED]
    else:
        # Some Linux versions refuse to share a write-sealed memfd.
        ways = [mmap.MAP_SHARED, mmap.MAP_PRIVATE]
    for flags in ways:
        address = _LIBC.mmap(at, length, protection, flags, fd, 0)
        if address != _MAP_FAILED and address is not None:
            # A child has no pages there, so that it cannot read what the host recycled meanwhile.
            _LIBC.madvise(address, length, _MADV_DONTFORK)
            return int(address)
    errno = ctypes.get_errno()
    raise OSError(errno, f"cannot map a segment of {length} bytes: {os.strerror(errno)}")


def _unmap(address: int, length: int, process: int, owner: Owner) -> None:
    # In a forked child something of its own may lie there by now.
    if os.getpid() == process:
        owner.leaving()
        _LIBC.munmap(address, length)
        owner.left()
