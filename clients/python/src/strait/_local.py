"""`local`: a host of this program's own, started when it is first asked for, that ends with the program.

    this program ── write end of a pipe ──▶ stdin of `strait serve --temporary --until-stdin-ends`

Linux closes the pipe whatever the program dies of; then the host ends and removes its directory. So nothing else may
hold the write end: it is closed on exec, and a forked child closes its copy of it.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from importlib import metadata
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Union

from . import _address, _wire
from ._connection import Connection
from ._errors import NoHostError
from ._session import VERSION, Session

#: Longest ready line, and what is shown of one that is wrong.
_LINE_BYTES_MAX = 64 << 10
_SHOWN_CHARS = 200
#: What is shown of the end of the host's stderr.
_TAIL_BYTES = 2 << 10
#: At the end of the program a host is waited for, so long at most.
_END_SECONDS = 3.0
#: And so long if it did not become ready, before it is killed.
_KILL_SECONDS = 1.0
#: After the end of a connection the end of the host's process is not far, if it has one.
_DEATH_SECONDS = 1.0
_SETTING = re.compile(r"[a-z]+\.[a-z_]+")
#: Settings that say where a host is found, and the one that `plugins` is for.
_NOT_SETTINGS = ("server.directory", "server.tcp", "server.plugins")

_StrPath = Union[str, "os.PathLike[str]"]
#: What tells one host from another: plugins, as they were when it started, and settings.
_Key = Tuple[Tuple[Tuple[Any, ...], ...], Tuple[Tuple[str, str], ...]]


def local(
    plugins: Sequence[_StrPath] = (),
    *,
    settings: Optional[Mapping[str, Any]] = None,
    timeout: float = 60.0,
    renew: bool = True,
    lease: Optional[float] = None,
    name: str = f"strait-python/{VERSION}",
) -> Session:
    """A session with a host of this program's own, which is started if it is not running yet.

        with strait.local(plugins=["my_plugin.wasm"]) as s:
            y = s.call("smooth", x)

    The host is private to this program and ends with it, however the program ends. Calls with the same plugins and
    settings share one host: what one session publishes, the others see. Other plugins or settings, or a plugin's
    file that has changed, are another host's. `close` ends the session, not the host. A host that has died is succeeded by a
    new, empty one in the next call. A forked child gets hosts of its own.

    The program of the host is `$STRAIT_BIN`, else the one that was installed with this package, else `strait` on the
    PATH. `plugins`: files to load beside the standard plugin. `settings`: as in docs/operations.md, such as
    `{"limits.deadline_ms_default": 5000}`; the environment's (`STRAIT__SECTION__KEY`) hold, too. `timeout`: seconds until the host
    must be ready. `renew`, `lease` and `name` are those of `connect`.

    Raises `NoHostError` if there is no such program or it does not become a host of this package's protocol, with
    the end of what it wrote to stderr; `FileNotFoundError` for a plugin that is not there.
    """
    words, key_plugins = _plugins(plugins)
    environment = _environment(settings)
    key = (key_plugins, tuple(sorted(environment.items())))
    with _hosts_lock:
        host = _hosts.setdefault(key, _Host())
    running = host.start(words, environment, timeout)
    connection = Connection.connect(_address.directory(running.address), name, renew)
    connection.epitaph = running.epitaph
    return Session(connection, lease)


def _plugins(given: Sequence[_StrPath]) -> Tuple[List[str], Tuple[Tuple[Any, ...], ...]]:
    """The options that load them, and what tells them from others and from other versions of themselves."""
    if isinstance(given, (str, bytes, os.PathLike)):
        raise TypeError(f"plugins is a list of files, also for one: plugins=[{given!r}]")
    paths = [os.path.abspath(os.fspath(path)) for path in given]
    words = [word for path in paths for word in ("--plugin", path)]
    found = [(path, os.stat(path)) for path in paths]
    return words, tuple((path, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns) for path, at in found)


def _environment(settings: Optional[Mapping[str, Any]]) -> Dict[str, str]:
    """Settings as the host's environment has them."""
    environment = {}
    for key, value in (settings or {}).items():
        if not isinstance(key, str) or not _SETTING.fullmatch(key):
            raise ValueError(f"setting {key!r} is not of the form \"section.key\", such as \"limits.deadline_ms_default\"")
        if key in _NOT_SETTINGS:
            raise ValueError(f"setting {key!r} is not for a local host, which has a directory of its own and takes plugins=[...]")
        if not isinstance(value, (bool, int, float, str)):
            raise TypeError(f"setting {key!r} is {value!r}; it is a number, text or a truth value")
        text = str(value).lower() if isinstance(value, bool) else str(value)
        environment["STRAIT__" + key.upper().replace(".", "__")] = text
    return environment


class _Host:
    """A host of this process, which is started when it is asked for and not running."""

    def __init__(self) -> None:
        # Held while it starts: whoever else wants it waits.
        self._lock = threading.Lock()
        self.running: Optional[_Running] = None

    def start(self, words: Sequence[str], environment: Mapping[str, str], timeout: float) -> "_Running":
        with self._lock:
            if self.running is not None and not self.running.alive:
                self.running.end()
                self.running = None
            if self.running is None:
                self.running = _Running(words, environment, timeout)
            return self.running


class _Running:
    """A host's process, from its start on."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], timeout: float) -> None:
        program, source = _program()
        self._name = f"{program} ({source})"
        # Unlinked: it is gone with the last process that has it open.
        self._stderr = tempfile.TemporaryFile()
        words = [program, "serve", "--temporary", "--until-stdin-ends", "--json", "--log-level", "warn", *words]
        try:
            with _fork_lock:
                stdin, self._stdin = os.pipe()
                _write_ends.add(self._stdin)
                try:
                    process = subprocess.Popen(
                        words,
                        stdin=stdin,
                        stdout=subprocess.PIPE,
                        stderr=self._stderr,
                        bufsize=0,
                        env={**os.environ, **environment},
                        # A Ctrl-C is for this program: the host must live to tell it what became of its calls.
                        start_new_session=True,
                    )
                except BaseException:
                    _close_pipe(self._stdin)
                    raise
                finally:
                    os.close(stdin)
        except OSError as error:
            self._stderr.close()
            raise NoHostError(f"{self._name} cannot be started: {error}") from error
        self._process = process
        try:
            self.address = self._ready(timeout)
        except BaseException:
            self._kill()
            raise
        # Takes note of its end at once, so that nothing is left of a host that dies early.
        self._reaper = threading.Thread(target=process.wait, name="strait-local", daemon=True)
        self._reaper.start()

    @property
    def alive(self) -> bool:
        return self._reaper.is_alive()

    def _ready(self, timeout: float) -> str:
        """Waits for the line that says that it is ready; returns the address."""
        stdout = self._process.stdout
        assert stdout is not None
        with stdout:
            line = _read_line(stdout.fileno(), time.monotonic() + timeout)
        if line is None:
            raise NoHostError(
                f"{self._name} was not ready within {timeout:g} s; strait.local(timeout=...) waits longer{self._tail()}"
            )
        ready = _object(line)
        address, protocol = ready.get("address"), ready.get("protocol")
        if isinstance(address, str) and address.startswith("unix:///") and isinstance(protocol, int):
            if protocol != _wire.PROTOCOL:
                raise NoHostError(
                    f"{self._name} is strait {ready.get('version')} and speaks protocol {protocol}, this package, {VERSION}, protocol "
                    f"{_wire.PROTOCOL}; use versions that belong together: install the same one of both, or name its program in STRAIT_BIN"
                )
            return address
        said = f"; it said {line[:_SHOWN_CHARS].decode(errors='replace')!r}" if line and "error" not in ready else ""
        try:
            self._process.wait(_DEATH_SECONDS)
        except subprocess.TimeoutExpired:
            raise NoHostError(
                f"{self._name} does not say that it is ready as strait {VERSION} does{said}; name the right program in STRAIT_BIN{self._tail()}"
            ) from None
        raise NoHostError(f"{self._name} started no host: it {_how(self._process.returncode)}{said}{self._tail()}")

    def _tail(self) -> str:
        """The end of what it wrote to stderr."""
        length = os.fstat(self._stderr.fileno()).st_size
        start = max(0, length - _TAIL_BYTES)
        text = os.pread(self._stderr.fileno(), _TAIL_BYTES, start).decode(errors="replace").strip()
        if not text:
            return "; it wrote nothing to stderr"
        cut = "..." if start else ""
        return f"; its stderr ends with:\n{cut}{text}"

    def epitaph(self) -> str:
        """How it died, if it did."""
        self._reaper.join(_DEATH_SECONDS)
        if self.alive:
            return ""
        return f"; the host, {self._name}, {_how(self._process.returncode)}{self._tail()}"

    def _kill(self) -> None:
        """Ends one that is not ready."""
        _close_pipe(self._stdin)
        try:
            # A real host removes its directory.
            self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self._process.poll() is None:
                # With whatever it started: it has a process group of its own.
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._stderr.close()

    def end(self) -> None:
        _close_pipe(self._stdin)
        self._reaper.join(_END_SECONDS)

    def forget(self) -> None:
        # Popen would complain of a process that it did not see end.
        self._process.returncode = 0


def _program() -> Tuple[str, str]:
    """The host's program, and where it was found."""
    named = os.environ.get("STRAIT_BIN")
    if named:
        found = shutil.which(named)
        if found is None:
            raise NoHostError(f"STRAIT_BIN names {named}, which is not a program that can be run; name the `strait` program, or unset it")
        return found, "from STRAIT_BIN"
    installed = _installed()
    if installed is not None:
        return installed, "installed with this package"
    found = shutil.which("strait")
    if found is not None:
        return found, "from the PATH"
    raise NoHostError(
        "there is no `strait` program to start a host with: this package was installed without one, and there is none on the PATH; install "
        "the wheel that has it (cargo xtask wheel makes one), build it in strait's checkout (cargo install --path .), or name it in STRAIT_BIN"
    )


def _installed() -> Optional[str]:
    """The program that the same wheel brought."""
    try:
        files = metadata.distribution("strait").files or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "strait" and file.parent.name == "bin":
            path = os.path.abspath(str(file.locate()))
            if os.access(path, os.X_OK):
                return path
    return None


def _read_line(fd: int, until: float) -> Optional[bytes]:
    """The first line, or what there is of one at the end of the file; None if neither comes in time."""
    line = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while b"\n" not in line and len(line) < _LINE_BYTES_MAX:
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return None
        more = os.read(fd, _LINE_BYTES_MAX)
        if not more:
            break
        line += more
    return line.split(b"\n")[0]


def _object(line: bytes) -> Dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _how(returncode: int) -> str:
    if returncode < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"was ended by {names.get(-returncode, f'signal {-returncode}')}"
    return f"ended with exit code {returncode}"


# Pipes, forks and the end of the program

_hosts: Dict[_Key, _Host] = {}
_hosts_lock = threading.Lock()
#: Write ends of pipes: what a forked child has to close.
_write_ends: Set[int] = set()
#: Held while a process is started, and over a fork: else the child would have pipes that are in no list yet, and whoever waits for
#: their end would wait for the child's. It can be taken again by a finalizer that forks.
_fork_lock = threading.RLock()


def _close_pipe(write: int) -> None:
    with _fork_lock:
        if write in _write_ends:
            _write_ends.discard(write)
            os.close(write)


def _after_fork_in_child() -> None:
    global _hosts_lock, _fork_lock
    # Other threads, which are not here, may have held them.
    _hosts_lock = threading.Lock()
    _fork_lock = threading.RLock()
    for write in list(_write_ends):
        _close_pipe(write)
    for host in _hosts.values():
        if host.running is not None:
            host.running.forget()
    _hosts.clear()


def _end_all() -> None:
    """Sees the hosts end, so that not even a zombie outlives this program where nobody reaps orphans."""
    for write in list(_write_ends):
        _close_pipe(write)
    for host in list(_hosts.values()):
        if host.running is not None:
            host.running.end()


os.register_at_fork(
    before=lambda: _fork_lock.acquire(),
    after_in_parent=lambda: _fork_lock.release(),
    after_in_child=_after_fork_in_child,
)
atexit.register(_end_all)
