"""A wall clock that jumps, for every Python process that has this folder on its path.

Python runs this file when it starts. `time.time()` is off by as many seconds as the file named by `CHAOS_CLOCK` holds
(a float64). A stand-in: setting the machine's clock would disturb all else that runs on it, and Linux has
namespaces for other clocks alone. The C++ parts of Ray and vLLM see the true time, and so does `datetime`.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

if (_path := os.environ.get("CHAOS_CLOCK")) and os.path.isfile(_path):
    _true = time.time
    with open(_path, "rb") as _file:
        _offset = mmap.mmap(_file.fileno(), 8, access=mmap.ACCESS_READ)

    def _time() -> float:
        return _true() + struct.unpack_from("d", _offset)[0]

    time.time = _time
