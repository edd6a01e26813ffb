"""Files of full size that take little time and no room."""

import json
import math

import numpy as np


def random_file(path, tensors, filled=lambda name: True):
    """Safetensors: random bits, read as bfloat16, where `filled(name)`; elsewhere a hole, read as zeros."""
    rng = np.random.default_rng(0)
    header, end = {}, 0
    for name, t in tensors.items():
        size = 2 * math.prod(t.shape)
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            if filled(name):
                file.seek(8 + len(text) + start)
                file.write(rng.bytes(stop - start))
        file.truncate(8 + len(text) + end)
