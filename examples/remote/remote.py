"""Calls a kernel of a host that may be anywhere: remote.py ADDRESS, with STRAIT_TOKEN and STRAIT_CA for TLS."""

import os
import sys

import numpy as np

import strait

with strait.connect(sys.argv[1], token=os.environ.get("STRAIT_TOKEN"), ca=os.environ.get("STRAIT_CA")) as s:
    x = np.arange(1_000_000, dtype=np.float64).reshape(1000, 1000)
    y = s.call("zscore", x, axis=0, publish={"y": "from-python"}, replace=True)
    print("Python: zscore begins with", np.round(y[0, :2], 2), "and", s.client_stats().copied_bytes, "bytes travelled")
    if "from-go" in [flight.name for flight in s.list()]:
        np.testing.assert_array_equal(s.get("from-go"), y)
        print("Python: Go published the same")
    try:
        s.call("zscore", x[:2], axis=7)
    except strait.RemoteError as error:
        print("Python: refused:", error.reason)
