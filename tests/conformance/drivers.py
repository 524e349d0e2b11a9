"""Hosts and drivers as processes."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ANSWER_SECONDS = 120
START_SECONDS = 30


class DriverError(AssertionError):
    """A driver that could not be built, died, or does not keep to the protocol."""


def binary():
    path = os.environ.get("STRAIT_BIN")
    if not path:
        raise RuntimeError("STRAIT_BIN is not set: name the host's program, such as target/release/strait")
    return str(Path(path).resolve())


class Host:
    """`strait serve` in a directory of its own."""

    def __init__(self, plugins=()):
        # Not pytest's directories: a socket's path has room for 107 bytes.
        self.directory = tempfile.mkdtemp(prefix="strait-conformance-")
        self.address = f"unix://{self.directory}"
        self._log = open(os.path.join(self.directory, "log"), "w+b")
        command = [binary(), "serve", "--directory", self.directory]
        for plugin in plugins:
            command += ["--plugin", str(plugin)]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self._wait()

    def _wait(self):
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"the host ended with {self.process.returncode}: {self.log()}")
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                try:
                    probe.connect(os.path.join(self.directory, "data.sock"))
                    return
                except OSError:
                    time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"the host does not listen after {START_SECONDS} s: {self.log()}")

    def log(self):
        self._log.flush()
        return Path(self._log.name).read_text(errors="replace")[-4000:]

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        """Ends it as an operator would; answers its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
        self._log.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        return self.process.returncode


class Driver:
    """One language's driver process."""

    def __init__(self, folder):
        self.folder = folder
        self.description = json.loads((folder / "driver.json").read_text())
        self.language = self.description["language"]
        # It reaches hosts over Flight, as from another machine.
        self.far = self.description.get("far", False)
        target = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve()
        self._places = {
            "here": str(folder),
            "root": str(ROOT),
            "build": str(target / "conformance" / self.language),
            "target": str(target),
            "python": sys.executable,
        }
        self.process = None
        self._rest = b""
        # Asked and not answered yet.
        self.owed = 0

    def _fill(self, text):
        for name, place in self._places.items():
            text = text.replace("{" + name + "}", place)
        return text

    def _environment(self):
        extra = {name: self._fill(value) for name, value in self.description.get("env", {}).items()}
        return {**os.environ, **extra}

    def build(self):
        os.makedirs(self._places["build"], exist_ok=True)
        for command in self.description.get("build", []):
            command = [self._fill(word) for word in command]
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=self._environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            except FileNotFoundError:
                raise DriverError(
                    f"{self.language}: {command[0]!r} is not on PATH; install it, or leave the language out of STRAIT_LANGUAGES"
                ) from None
            if done.returncode != 0:
                raise DriverError(f"{self.language}: {command} failed: {done.stdout.decode(errors='replace')[-4000:]}")

    def start(self):
        command = [self._fill(word) for word in self.description["command"]]
        self._errors = tempfile.TemporaryFile()
        self._rest = b""
        self.owed = 0
        try:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
            )
        except FileNotFoundError:
            raise DriverError(
                f"{self.language}: {command[0]!r} is not on PATH; install it, or leave the language out of STRAIT_LANGUAGES"
            ) from None

    @property
    def alive(self):
        return self.process is not None and self.process.poll() is None

    def ask(self, op, **fields):
        """The answer, whatever it is."""
        self.send(op, **fields)
        return self.answer(op)

    def send(self, op, **fields):
        try:
            self.process.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
            self.process.stdin.flush()
            self.owed += 1
        except OSError as error:
            raise DriverError(f"{self.language}: driver takes no {op}: {error}; {self._last_words()}") from None

    def answer(self, op):
        until = time.monotonic() + ANSWER_SECONDS
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, until - time.monotonic()))
            more = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not more:
                self.process.kill()
                what = f"ended with {self.process.wait()}" if ready else f"said nothing for {ANSWER_SECONDS} s"
                raise DriverError(f"{self.language}: driver {what} after {op}; {self._last_words()}")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        self.owed -= 1
        try:
            answer = json.loads(line)
        except ValueError:
            raise DriverError(f"{self.language}: driver answered {op} by {line[:200]!r}, which is not JSON") from None
        if answer.get("kind") == "driver":
            raise DriverError(f"{self.language}: driver failed at {op}: {answer.get('message')}")
        return answer

    def do(self, op, **fields):
        """The answer, which must be a success."""
        answer = self.ask(op, **fields)
        assert answer.get("ok") is True, f"{self.language}: {op} {fields}: {answer}"
        return answer

    def is_silent(self, seconds):
        """Whether nothing is answered for so long."""
        return not self._rest and not select.select([self.process.stdout], [], [], seconds)[0]

    def address_of(self, host):
        """Where it finds a host, or the directory of one."""
        address = host if isinstance(host, str) else host.address
        return address.replace("unix://", "grpc+unix://") + "/flight.sock" if self.far else address

    def kill(self):
        """As `kill -9` does; it starts again when it is next needed."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None

    def _last_words(self):
        self._errors.seek(0)
        return "its stderr: " + self._errors.read().decode(errors="replace")[-4000:]

    def stop(self):
        """Answers the exit code."""
        if self.process is None:
            return None
        if self.alive:
            try:
                self.ask("exit")
                self.process.wait(30)
            except (DriverError, subprocess.TimeoutExpired):
                self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.returncode

    def counts(self):
        """Descriptors and mappings of the driver's process."""
        proc = Path(f"/proc/{self.process.pid}")
        return {"fds": len(os.listdir(proc / "fd")), "mappings": len((proc / "maps").read_text().splitlines())}


def languages():
    """The drivers there are, or those that STRAIT_LANGUAGES names."""
    found = {path.parent.name: path.parent for path in sorted(HERE.glob("drivers/*/driver.json"))}
    wanted = os.environ.get("STRAIT_LANGUAGES")
    if not wanted:
        return found
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in found]
    if unknown:
        raise RuntimeError(f"STRAIT_LANGUAGES names {', '.join(unknown)}; there are {', '.join(found)}")
    return {name: found[name] for name in names}
