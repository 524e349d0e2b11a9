"""`matmul` of a host beside numpy's BLAS on one thread and plain native loops, in one run.

    STRAIT_BIN=target/release/strait python benches/matmul.py        (numpy and the Python client; rustc on the PATH)

A line for each dtype and shape (m, k, n): the best of several calls, from the client, input to output in segments, and how many
times as long that is as each of the others.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before numpy is loaded.
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "clients/python/src"))

import numpy as np
import strait

SHAPES = [(1024, 1024, 1024), (1000, 1000, 1000), (512, 512, 512), (256, 256, 256), (4096, 64, 4096), (4096, 1000, 1), (1, 2000, 2000)]
ROUNDS = 5
# The loops that anybody writes: row by row, so that the inner one is SIMD code of the machine's full width.
LOOPS = """
macro_rules! loops {
    ($name:ident, $t:ty) => {
        #[no_mangle]
        pub unsafe extern "C" fn $name(a: *const $t, b: *const $t, y: *mut $t, m: usize, k: usize, n: usize) {
            let (a, b) = (std::slice::from_raw_parts(a, m * k), std::slice::from_raw_parts(b, k * n));
            let y = std::slice::from_raw_parts_mut(y, m * n);
            y.fill(0.0);
            for (a, y) in a.chunks_exact(k).zip(y.chunks_exact_mut(n)) {
                for (a, b) in a.iter().zip(b.chunks_exact(n)) {
                    for (y, b) in y.iter_mut().zip(b) {
                        *y += a * b;
                    }
                }
            }
        }
    };
}
loops!(float32, f32);
loops!(float64, f64);
"""


def best(run):
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def native_loops(folder):
    source, library = folder / "loops.rs", folder / "loops.so"
    source.write_text(LOOPS)
    command = ["rustc", "--edition=2021", "--crate-type=cdylib", "-Copt-level=3", "-Ctarget-cpu=native", "-o", library, source]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def compare(session, native, dtype, shape):
    m, k, n = shape
    random = np.random.default_rng(1)
    a, b = session.empty((m, k), dtype), session.empty((k, n), dtype)
    a[:], b[:] = random.normal(size=a.shape), random.normal(size=b.shape)
    y = np.empty((m, n), dtype)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (a, b, y)]
    sizes = [ctypes.c_size_t(size) for size in shape]

    def loops():
        getattr(native, dtype)(*pointers, *sizes)

    seconds = [best(lambda: session.call("matmul", a, b).release()), best(lambda: np.matmul(a, b, out=y)), best(loops)]
    ours, blas, plain = seconds
    flops = 2 * m * k * n / ours / 1e9
    print(f"{dtype} {m:5} {k:5} {n:5}: {ours * 1e3:8.2f} ms, {flops:5.1f} GFLOP/s; numpy x {ours / blas:5.2f}, plain loops x {ours / plain:5.2f}", flush=True)


def main():
    with tempfile.TemporaryDirectory(prefix="strait-") as folder:
        folder = Path(folder)
        native = native_loops(folder)
        (folder / "host").mkdir(mode=0o700)
        words = [os.environ["STRAIT_BIN"], "serve", "--directory", folder / "host", "--log-level", "warn", "--until-stdin-ends"]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as host:
            host.stdout.readline()
            with strait.connect(f"unix://{folder}/host") as session:
                for dtype in ("float64", "float32"):
                    for shape in SHAPES:
                        compare(session, native, dtype, shape)
            host.stdin.close()


if __name__ == "__main__":
    main()
