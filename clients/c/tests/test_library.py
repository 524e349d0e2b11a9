"""libstrait as it is installed below target/client-c, through programs in C and C++, against a real host: as they are, under the
address and undefined-behaviour sanitizers, and under valgrind. `cargo xtask test client-c` installs it and runs this."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PREFIX = ROOT / "target/client-c"
sys.path.append(str(ROOT / "tests/conformance"))

from drivers import Host  # noqa: E402

PATIENCE_SECONDS = 300
WARNINGS = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pedantic"]
C, CPP = ["cc", "-std=c11", *WARNINGS], ["c++", "-std=c++17", *WARNINGS]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def address():
    guests = Path(os.environ["STRAIT_TEST_PLUGINS"])
    host = Host([guests / "spins.wasm", guests / "traps.wasm"])
    yield host.address
    assert host.stop() == 0, "the host did not end cleanly"


def environment(**more):
    return {**os.environ, "PKG_CONFIG_PATH": str(PREFIX / "lib/pkgconfig"), "LD_LIBRARY_PATH": str(PREFIX / "lib"), **more}


def run(command, **more):
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def built(folder, compiler, source, *flags, libs=("--libs",)):
    program = folder / source.stem
    found = shlex.split(run(["pkg-config", "--cflags", *libs, "strait"]))
    run([*compiler, *flags, "-D_DEFAULT_SOURCE", str(source), "-o", str(program), *found, "-pthread"])
    return str(program)


LIBRARY = Path(__file__).with_name("library.c")


def test_every_function(tmp_path, address):
    assert "all of strait.h" in run([built(tmp_path, C, LIBRARY)], STRAIT_ADDRESS=address)


def test_every_function_is_used():
    declared = re.findall(r"\b(strait_\w+)\(", (PREFIX / "include/strait.h").read_text().split('extern "C" {')[1])
    text = LIBRARY.read_text()
    # The macro STRAIT_ABI_MATCHES calls it.
    missing = {name for name in declared if f"{name}(" not in text} - {"strait_abi_version"}
    assert not missing, missing


def test_sanitizers(tmp_path, address):
    program = built(tmp_path, C, LIBRARY, *SANITIZED)
    run([program], STRAIT_ADDRESS=address, ASAN_OPTIONS="detect_leaks=1", UBSAN_OPTIONS="print_stacktrace=1")


def test_conformance_with_sanitizers():
    """As the step `conformance` runs it, but for how the driver is built."""
    flags = " ".join(["-O1", *SANITIZED])
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/conformance")]
    run(words, STRAIT_LANGUAGES="c", CFLAGS=flags, ASAN_OPTIONS="detect_leaks=1", UBSAN_OPTIONS="print_stacktrace=1")


def test_valgrind(tmp_path, address):
    words = ["valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite,indirect"]
    run([*words, built(tmp_path, C, LIBRARY)], STRAIT_ADDRESS=address)


def test_the_static_library(tmp_path, address):
    found = run(["pkg-config", "--variable=libdir", "strait"]).strip()
    program = tmp_path / "static"
    needed = shlex.split(run(["pkg-config", "--static", "--libs", "strait"]))
    needed = [f"{found}/libstrait.a" if word == "-lstrait" else word for word in needed]
    run([*C, "-D_DEFAULT_SOURCE", f"-I{PREFIX}/include", str(LIBRARY), "-o", str(program), *needed, "-pthread"])
    run([str(program)], STRAIT_ADDRESS=address)


@pytest.mark.parametrize(("compiler", "name"), [(C, "first.c"), (CPP, "first.cpp")])
@pytest.mark.parametrize("flags", [[], SANITIZED], ids=["plain", "sanitized"])
def test_first_program(tmp_path, address, compiler, name, flags):
    said = run([built(tmp_path, compiler, ROOT / "examples/c" / name, *flags)], STRAIT_ADDRESS=address)
    assert "-1.73" in said and re.search(r"copied.*: 0$", said, re.MULTILINE), said
    environment_without = environment(STRAIT_ADDRESS="unix:///nowhere")
    done = subprocess.run([tmp_path / Path(name).stem], env=environment_without, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "NO_HOST" in done.stderr
