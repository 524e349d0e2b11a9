"""Everything in examples/ as its reader runs it: each language's first programs (Rust's are examples of its client)
against a host, and the scripts called `run`, which start what they need, on small data.

Needs what `cargo xtask test examples` sets up: Go and Julia on the PATH, the Python client, the host's program in
STRAIT_BIN and Rust's examples beside it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE_SECONDS, environment

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def programs():
    """Name, command and folder of each program."""
    yield "rust/first", [Path(os.environ["STRAIT_BIN"]).parent / "examples/first"], ROOT
    commands = {"python": ("*.py", [sys.executable]), "go": ("*.go", ["go", "run"]), "julia": ("*.jl", ["julia", "--startup-file=no"])}
    for language, (pattern, command) in commands.items():
        for file in sorted((EXAMPLES / language).glob(pattern)):
            yield f"{language}/{file.stem}", [*command, file.name], file.parent


@pytest.mark.parametrize(("program", "folder"), [pytest.param(*rest, id=name) for name, *rest in programs()])
def test_first_program(host, program, folder):
    env = environment() | {
        "STRAIT_ADDRESS": f"unix://{host.directory}",
        "JULIA_LOAD_PATH": f"{ROOT / 'clients/julia'}:@stdlib",
    }
    done = subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, f"{program}\n{done.stdout}\n{done.stderr}"
    # All of them say the same: where 0, 1, 2 ... begin when scaled, and that nothing was copied.
    assert "-1.73" in done.stdout and re.search(r"copied.*: 0$", done.stdout, re.MULTILINE), done.stdout


# What makes them small.
SCRIPTS = {"go-julia": ["--quick"], "live-signal": ["--quick"], "remote": [], "small-calls": ["200"]}


def test_every_script_is_known():
    assert {script.parent.name for script in EXAMPLES.glob("*/run")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name):
    env = environment() | {"STRAIT_BIN": os.environ["STRAIT_BIN"], "JULIA": shutil.which("julia"), "PYTHON": sys.executable}
    command = [EXAMPLES / name / "run", *SCRIPTS[name]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=5 * PATIENCE_SECONDS)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "left out" not in done.stderr, done.stderr
