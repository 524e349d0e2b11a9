"""`strait.local()`: real programs that start real hosts, use them, fork, and die of this and that."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import strait

PATIENCE = 30.0
#: A host ends within milliseconds of its program; here other programs may have the processors.
END = 10.0
#: What every program of these tests begins with.
PRELUDE = """
import json, os, signal, socket, struct, subprocess, sys, threading, time
import numpy as np
import strait

def pid_of(session):
    peer = session._connection._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return struct.unpack("3i", peer)[0]

def directory_of(session):
    return session._connection.welcome["directory"]

def tell(**facts):
    print(json.dumps(facts), flush=True)
"""


@pytest.fixture
def place():
    """An empty directory where hosts put theirs. It has a short path, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="strait-local-") as directory:
        yield Path(directory)


@pytest.fixture
def host_program():
    program = os.environ.get("STRAIT_BIN")
    if not program:
        pytest.skip("STRAIT_BIN is not set: name the host's program")
    return program


def environment(place, **more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STRAIT_") or name.startswith("STRAIT__")}
    return {**kept, "TMPDIR": str(place), **more}


@contextlib.contextmanager
def program(place, host, text):
    """A Python program with `text`, in a process group of its own, for as long as the block; killed at its end."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", "-c", PRELUDE + text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(place, STRAIT_BIN=host),
        start_new_session=True,
    )
    try:
        with process:
            yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def told(process):
    return json.loads(process.stdout.readline())


def exists(pid):
    return os.path.exists(f"/proc/{pid}")


def runs(pid):
    """Whether it is there, and not a zombie that only waits for whoever reaps orphans here."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def within(seconds, holds):
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


# A host and its program


def test_a_program_uses_a_host_that_ends_with_it(place, host_program):
    text = """
with strait.local() as first, strait.local() as second:
    x = first.empty((1000, 100))
    x[:] = np.arange(100_000).reshape(1000, 100)
    y = first.call("scale-shift", x, a=2, b=1)
    assert (y == 2 * x + 1).all() and y.info.copied_bytes == 0
    first.put("x", x)
    assert (second.get("x") == x).all()
    assert first.host_id == second.host_id
    tell(pid=pid_of(first), directory=directory_of(first), mode=os.stat(directory_of(first)).st_mode & 0o777)
# What was published outlives the sessions.
with strait.local() as third:
    assert (third.get("x") == x).all()
"""
    with program(place, host_program, text) as process:
        host = told(process)
        assert process.wait(PATIENCE) == 0
    assert host["mode"] == 0o700 and Path(host["directory"]).parent == place
    # Its program waited for it: there is not even a zombie.
    assert not exists(host["pid"])
    assert list(place.iterdir()) == []


FORKED = "if os.fork() == 0:\n    time.sleep(60)\n    os._exit(0)\n"
POOL = "import multiprocessing\nprocess = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\nprocess.start()\n"
RUNNING = "subprocess.Popen(['sleep', '60'], close_fds=False)\n"
THREADS = "threading.Thread(target=time.sleep, args=(60,)).start()\n"
BUSY = "x = s.empty((1024, 1024))\nfor _ in range(8):\n    s.start('zscore', x)\n"


@pytest.mark.parametrize("more", ["", FORKED, POOL, RUNNING, THREADS, BUSY], ids=["alone", "forked", "pool", "child", "threads", "busy"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV], ids=lambda number: number.name)
def test_a_host_ends_whatever_its_program_dies_of(place, host_program, more, number):
    text = f"""
s = strait.local()
{more}
tell(pid=pid_of(s), directory=directory_of(s))
time.sleep(60)
"""
    with program(place, host_program, text) as process:
        host = told(process)
        assert runs(host["pid"]) and os.path.isdir(host["directory"])
        process.send_signal(number)
        assert process.wait(PATIENCE) == -number
        assert within(END, lambda: not runs(host["pid"]) and not os.path.exists(host["directory"]))
    assert list(place.iterdir()) == []


def test_a_program_that_is_killed_while_its_host_starts(place, host_program):
    # Nothing is compiled in that cache: the start takes long enough.
    text = f"""
os.environ["STRAIT__ENGINE__CACHE"] = {str(place / "cache")!r}
threading.Thread(target=strait.local).start()
time.sleep(0.3)
tell()
time.sleep(60)
"""
    with program(place, host_program, text) as process:
        told(process)
        process.kill()
        process.wait(PATIENCE)
        assert within(END, lambda: [path.name for path in place.iterdir()] in ([], ["cache"]))


def test_an_interrupt_is_the_programs_alone(place, host_program):
    text = """
s = strait.local()
try:
    tell(pid=pid_of(s))
    time.sleep(60)
except KeyboardInterrupt:
    s.ping()
    tell(pid=pid_of(s))
"""
    with program(place, host_program, text) as process:
        host = told(process)
        # As a terminal does.
        os.killpg(process.pid, signal.SIGINT)
        assert told(process) == host
        assert process.wait(PATIENCE) == 0


def test_threads_that_ask_at_once_get_one_host(place, host_program):
    text = """
from concurrent.futures import ThreadPoolExecutor
barrier = threading.Barrier(16)
def work(number):
    barrier.wait(30)
    with strait.local() as s:
        assert (s.call("scale-shift", np.full(10, float(number)), a=2.0) == 2 * number).all()
        return s.host_id
with ThreadPoolExecutor(16) as threads:
    tell(hosts=len(set(threads.map(work, range(16)))), directories=len(os.listdir(os.environ["TMPDIR"])))
"""
    with program(place, host_program, text) as process:
        assert told(process) == {"hosts": 1, "directories": 1}
        assert process.wait(PATIENCE) == 0


def test_a_forked_child_gets_a_host_of_its_own(place, host_program):
    text = """
import multiprocessing
s = strait.local()
s.put("x", np.arange(3.0))

def work(connection):
    try:
        s.ping()
    except strait.ForkedError as error:
        refused = str(error)
    with strait.local() as own, strait.local() as again:
        assert again.host_id == own.host_id
        connection.send((refused, own.host_id, [flight.name for flight in own.list()], pid_of(own)))

here, there = multiprocessing.Pipe()
child = multiprocessing.get_context("fork").Process(target=work, args=(there,))
child.start()
refused, host_id, flights, pid = here.recv()
child.join(30)
assert child.exitcode == 0 and "fork" in refused and host_id != s.host_id and flights == []
tell(child=pid, own=pid_of(s))
# Many at once, while a thread starts hosts here.
def hosts():
    for n in range(3):
        strait.local(settings={"limits.deadline_ms_default": 1000 + n}).ping()
thread = threading.Thread(target=hosts)
thread.start()
children = []
while thread.is_alive():
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    children.append(pid)
    time.sleep(0.02)
thread.join()
s.ping()
tell(children=children)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with program(place, host_program, text) as process:
        pids = told(process)
        assert runs(pids["own"])
        assert within(PATIENCE, lambda: not runs(pids["child"]))
        children = told(process)["children"]
        process.wait(PATIENCE)
        # Its forked children live, and none of them keeps one of its four hosts.
        assert children and all(runs(child) for child in children)
        assert within(END, lambda: list(place.iterdir()) == [])


def test_a_child_that_uses_its_parents_pool(place, host_program):
    text = """
import multiprocessing
strait.local().ping()
def work(n):
    return float(strait.local().call("scale-shift", np.array([1.0 * n]), a=2.0)[0])
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(work, range(10)) == [2.0 * n for n in range(10)]
"""
    with program(place, host_program, text) as process:
        assert process.wait(PATIENCE) == 0
    assert within(PATIENCE, lambda: list(place.iterdir()) == [])


def test_a_host_that_dies_is_told_of_and_succeeded(place, host_program):
    text = """
s = strait.local()
s.put("x", np.arange(3.0))
pid = pid_of(s)
os.kill(pid, signal.SIGKILL)
for _ in range(2):
    try:
        s.call("scale-shift", "x", a=2.0)
    except strait.DisconnectedError as error:
        message = str(error)
successor = strait.local()
tell(message=message, flights=len(successor.list()), zombie=os.path.exists(f"/proc/{pid}"), pipes=len(strait._local._write_ends))
"""
    with program(place, host_program, text) as process:
        outcome = told(process)
        assert process.wait(PATIENCE) == 0
    assert "was ended by SIGKILL" in outcome["message"] and host_program in outcome["message"]
    assert outcome["flights"] == 0 and not outcome["zombie"] and outcome["pipes"] == 1


# Which host


def test_settings_and_plugins_tell_hosts_apart(place, host_program):
    guests = os.environ.get("STRAIT_TEST_PLUGINS")
    if not guests:
        pytest.skip("STRAIT_TEST_PLUGINS is not set: name a directory with plugins of the tests")
    text = f"""
import shutil
plugin = os.environ["TMPDIR"] + "/plugin.wasm"
shutil.copy({guests!r} + "/counts_runs.wasm", plugin)
os.chdir(os.environ["TMPDIR"])
settings = {{"limits.deadline_ms_default": 4321, "engine.epoch_interruption": True}}
sessions = [
    strait.local(),
    strait.local(settings=settings), strait.local(settings=dict(reversed(settings.items()))), strait.local([], settings=settings),
    strait.local([plugin]), strait.local(plugins=("plugin.wasm",)),
]
ids = [s.host_id for s in sessions]
assert ids[1] == ids[2] == ids[3] and ids[4] == ids[5] and len(set(ids)) == 3
assert sessions[1]._connection.welcome["deadline_ms_default"] == 4321
plugins = lambda s: {{kernel.plugin for kernel in s.kernels()}}
assert plugins(sessions[0]) == {{"standard"}} and plugins(sessions[4]) == {{"standard", "counts_runs"}}
# Built anew: another file under the same name.
shutil.copy({guests!r} + "/copies.wasm", plugin + ".new")
os.replace(plugin + ".new", plugin)
changed = strait.local(plugins=["plugin.wasm"])
assert plugins(changed) == {{"standard", "copies"}} and plugins(sessions[5]) == {{"standard", "counts_runs"}}
tell()
"""
    with program(place, host_program, text) as process:
        assert told(process) == {}
        assert process.wait(PATIENCE) == 0
    assert [path.name for path in place.iterdir()] == ["plugin.wasm"]


@pytest.mark.parametrize(
    "arguments, kind, says",
    [
        ({"plugins": "my.wasm"}, TypeError, "plugins=['my.wasm']"),
        ({"plugins": Path("my.wasm")}, TypeError, "a list of files"),
        ({"plugins": ["missing.wasm"]}, FileNotFoundError, "missing.wasm"),
        ({"plugins": [3]}, TypeError, "int"),
        ({"settings": {"deadline_ms_default": 3}}, ValueError, "section.key"),
        ({"settings": {"limits.deadline ms": 3}}, ValueError, "section.key"),
        ({"settings": {3: 3}}, ValueError, "section.key"),
        ({"settings": {"server.tcp": "127.0.0.1:1"}}, ValueError, "server.tcp"),
        ({"settings": {"server.plugins": "a"}}, ValueError, "plugins=[...]"),
        ({"settings": {"limits.log_bytes": None}}, TypeError, "limits.log_bytes"),
        ({"settings": {"limits.log_bytes": [1]}}, TypeError, "[1]"),
    ],
)
def test_what_is_no_plugin_or_setting(arguments, kind, says):
    with pytest.raises(kind) as caught:
        strait.local(**arguments)
    assert says in str(caught.value)


# Programs that are no host's. The tests call `local` in their own process, where no host starts.


@pytest.fixture
def nothing_is_left(place, monkeypatch):
    """After the test there are no more descriptors, children and files than before."""
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("STRAIT_ADDRESS", raising=False)

    def holdings():
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return len(os.listdir("/proc/self/fd")), sorted(children), sorted(path.name for path in place.glob("strait-host-*"))

    before = holdings()
    yield
    strait._local._end_all()
    strait._local._hosts.clear()
    # What an error's traceback still holds.
    gc.collect()
    assert holdings() == before


def failing(monkeypatch, program, **arguments):
    monkeypatch.setenv("STRAIT_BIN", str(program))
    with pytest.raises(strait.NoHostError) as caught:
        strait.local(**arguments)
    return str(caught.value)


def script(place, text):
    path = place / "strait"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_no_program_at_all(nothing_is_left, place, monkeypatch):
    monkeypatch.delenv("STRAIT_BIN", raising=False)
    monkeypatch.setenv("PATH", str(place))
    if strait._local._installed() is not None:
        pytest.skip("this package was installed with its program")
    with pytest.raises(strait.NoHostError) as caught:
        strait.local()
    for part in ("PATH", "STRAIT_BIN", "wheel", "cargo install"):
        assert part in str(caught.value)
    # And then one is found there.
    script(place, "exit 7")
    with pytest.raises(strait.NoHostError) as caught:
        strait.local()
    assert f"{place}/strait (from the PATH) started no host: it ended with exit code 7" in str(caught.value)


def test_what_cannot_be_run(nothing_is_left, place, monkeypatch):
    (place / "text").write_text("no program")
    (place / "binary").write_bytes(b"\x7fELF and no more")
    (place / "binary").chmod(0o755)
    (place / "no-shell").write_text("#!/no/such/shell\n")
    (place / "no-shell").chmod(0o755)
    for name in ("missing", "text", ".", "no-such-program-on-the-path"):
        assert "STRAIT_BIN names" in failing(monkeypatch, place / name if "-" not in name else name)
    for name in ("binary", "no-shell"):
        assert f"{place / name} (from STRAIT_BIN) cannot be started" in failing(monkeypatch, place / name)


READY = {"version": "9.9.9", "protocol": strait._wire.PROTOCOL, "address": "unix:///no/such"}


@pytest.mark.parametrize(
    "text, parts",
    [
        ("exit 3", ["ended with exit code 3", "wrote nothing to stderr"]),
        ("echo out of order >&2; exit 1", ["ended with exit code 1", "stderr ends with:\nout of order"]),
        ("echo hello; exit 0", ["ended with exit code 0", "said 'hello'"]),
        ("kill -9 $$", ["was ended by SIGKILL"]),
        ("echo hello; exec cat", ["does not say that it is ready", "said 'hello'", "STRAIT_BIN"]),
        ("echo hello; exec sleep 60", ["does not say that it is ready", "said 'hello'"]),
        ("exec >&-; exec sleep 60", ["does not say that it is ready"]),
        ("printf 'no line'; exec >&-; exec sleep 60", ["said 'no line'"]),
        ("exec cat /dev/zero", ["said '\\x00"]),
        ("printf '\\377\\376\\n'; exec cat", ["said '\ufffd\ufffd'"]),
        ("echo '[1]'; exec cat", ["said '[1]'"]),
        ("echo '{}'; exec cat", ["said '{}'"]),
        ("echo '{\"address\": 3, \"protocol\": 2}'; exec cat", ["does not say that it is ready"]),
        ("echo '{\"address\": \"tcp:1\", \"protocol\": 2}'; exec cat", ["does not say that it is ready"]),
        (f"echo '{json.dumps({**READY, 'protocol': 1})}'; exec cat", ["strait 9.9.9", "protocol 1", f"protocol {strait._wire.PROTOCOL}", "STRAIT_BIN"]),
        # One that says that it is and is not.
        (f"echo '{json.dumps(READY)}'; exec cat", ["no strait host at /no/such/data.sock"]),
        # As an older strait does.
        ("echo \"error: unexpected argument '--temporary' found\" >&2; exit 2", ["exit code 2", "unexpected argument '--temporary'"]),
    ],
)
def test_a_program_that_is_not_strait(nothing_is_left, place, monkeypatch, text, parts):
    message = failing(monkeypatch, script(place, text))
    for part in parts:
        assert part in message, message


def test_a_host_that_is_never_ready(nothing_is_left, place, monkeypatch):
    for text in ("exec sleep 60", "sleep 60", "trap '' TERM INT HUP; while :; do sleep 1; done", "printf half; exec sleep 60"):
        began = time.monotonic()
        message = failing(monkeypatch, script(place, f"echo waits >&2; {text}"), timeout=0.5)
        assert "was not ready within 0.5 s" in message and "timeout=" in message and "waits" in message
        assert time.monotonic() - began < 10


def test_only_the_end_of_a_long_stderr_is_shown(nothing_is_left, place, monkeypatch):
    message = failing(monkeypatch, script(place, "i=0; while [ $i -lt 2000 ]; do echo line $i >&2; i=$((i+1)); done; exit 1"))
    assert message.endswith("line 1999") and "line 1500" not in message and len(message) < 3000


def test_a_real_host_that_does_not_start(nothing_is_left, place, host_program, monkeypatch):
    (place / "not.wasm").write_text("not a component")
    message = failing(monkeypatch, host_program, plugins=[place / "not.wasm"])
    assert "exit code 1" in message and "not.wasm" in message
    message = failing(monkeypatch, host_program, settings={"limits.no_such": 1})
    assert "exit code 3" in message and "no_such" in message
    message = failing(monkeypatch, host_program, settings={"limits.deadline_ms_default": "soon"})
    assert "soon" in message


def test_an_interrupt_while_a_host_starts(place):
    path = script(place, "exec sleep 60")
    text = """
try:
    strait.local()
except KeyboardInterrupt:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        tell(children=file.read().split(), pipes=len(strait._local._write_ends))
"""
    with program(place, str(path), f"tell()\n{text}") as process:
        told(process)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert told(process) == {"children": [], "pipes": 0}
        assert process.wait(PATIENCE) == 0
