"""Run by `cargo xtask test wheel` where the wheel is installed and nothing else is: no host, no Rust."""

import os
import shutil
import sys

import numpy as np

import strait

program = shutil.which("strait")
assert program == os.path.join(os.path.dirname(sys.executable), "strait"), program

with strait.local() as s:
    x = np.arange(1_000_000.0).reshape(1000, 1000)
    s.put("x", x)
    y = s.call("scale-shift", "x", a=2, b=1, publish={"y": "y"})
    assert y.info.copied_bytes == 0
    assert (s.get("y") == 2 * x + 1).all()

# It is the wheel's program that was started, also where the PATH leads elsewhere.
os.environ["PATH"] = "/usr/bin:/bin"
assert strait._local._program() == (program, "installed with this package"), strait._local._program()
print("from the wheel to a call:", strait.__version__)
