"""python loads.py MODEL SHORTER one|mesh: loads a model as integers, and prints how memory grew.

What libraries and compiled programs take is there by then: one of fewer layers was loaded before.

Three numbers: the bytes by which its peak grew, those of the model as it is kept, and those of the largest
array of one layer in float32.
"""

import resource
import sys
from pathlib import Path

import omnifusion_jax as of
from omnifusion_jax.nn import nnx
from omnifusion_jax.sharding import make_mesh


def resident():
    """Bytes of memory that the process holds now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
    return int(line.split()[1]) * 1024


source, shorter, devices = sys.argv[1:]
how = {"weights": "int8", "mesh": make_mesh(fsdp=4, tensor=2) if devices == "mesh" else None}
of.load(shorter, **how)
before = resident()
model = of.load(source, **how)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
held = [shard.data.nbytes for a in nnx.parameters(model.module).values() for shard in a.addressable_shards]
print(peak - before, sum(held), model.config.decoder.width * model.config.decoder.mlp * 4)
