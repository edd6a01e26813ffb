"""python loads.py MODEL SHORTER one|mesh: loads a model as integers, and prints how memory grew.

What libraries and compiled programs take is there by then: one of fewer layers was loaded before.

Three numbers: the bytes by which its peak grew, those of the model as it is kept, and those of the largest
array of one layer in float32.
"""

import sys
from pathlib import Path

import omnifusion_jax as of
from omnifusion_jax.nn import nnx
from omnifusion_jax.sharding import make_mesh


def memory(name):
    """Bytes of memory that the process holds now (VmRSS), or held at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if name in line)
    return int(line.split()[1]) * 1024


source, shorter, devices = sys.argv[1:]
how = {"weights": "int8", "mesh": make_mesh(fsdp=4, tensor=2) if devices == "mesh" else None}
of.load(shorter, **how)
before = memory("VmRSS")
model = of.load(source, **how)
peak = memory("VmHWM")  # getrusage tells of the parent's memory too
held = [shard.data.nbytes for a in nnx.parameters(model.module).values() for shard in a.addressable_shards]
print(peak - before, sum(held), model.config.decoder.width * model.config.decoder.mlp * 4)
