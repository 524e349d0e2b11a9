"""The first program: fill an array in shared memory, run a kernel over it, read the result.

It needs a host (`strait serve`) and the client (`pip install ./clients/python`).
"""

import numpy as np

import strait

with strait.connect() as s:
    x = s.empty((1000, 1000))
    x[:] = np.arange(1_000_000).reshape(1000, 1000)
    y = s.call("zscore", x, axis=0)
    print("first column, scaled:", y[0, :1])
    print("bytes that the host copied:", y.info.copied_bytes)
    print("bytes that this program copied:", s.client_stats().copied_bytes)
