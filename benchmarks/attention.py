"""Measures each attention kernel, on any device, at the shapes of a 7B decoder and of CLIP-L/14-336.

python benchmarks/attention.py [rows, default 1] [dtype, default bfloat16, on a CPU float32]

On a CPU sequences are a quarter as long, but for answers.

Gflop/s counts two matrix products forward and four backward, of the pairs of tokens that see each other and
no others; scores that a kernel computes twice are counted once. Where answers are written, GB/s counts keys
and values, read once.
"""

import statistics
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.nn.attend import EVERYTHING, AttentionSpec, Choice, Places, attend, need, using
from omnifusion_jax.tables import KERNELS

REPEATS = 3


class Shape(NamedTuple):
    kv_heads: int
    group: int
    length: int
    head_dim: int
    rows: int = 1  # for each row that is asked for
    segment: int | None = None  # length of each dialogue of a row; None: an encoder's
    window: int | None = None
    queries: int | None = None  # the newest tokens, of an answer; None: all


SHAPES = {
    "decoder, four dialogues a row": Shape(8, 4, 2048, 128, segment=512),
    "decoder, one dialogue": Shape(8, 4, 2048, 128, segment=2048),
    "decoder, one dialogue, window of a quarter": Shape(8, 4, 2048, 128, segment=2048, window=512),
    "encoder, 8 pictures": Shape(16, 1, 577, 64, rows=8),
    "a token of 16 answers": Shape(8, 1, 1024, 128, rows=16, queries=1),
    "a token of 16 answers, heads in groups": Shape(8, 4, 1024, 128, rows=16, queries=1),
    "a token of 16 searches of three beams": Shape(8, 1, 1024, 128, rows=16, queries=3),
}


def shorter(shape):
    """The same with everything in tokens divided by four, if it is no answer."""
    if shape.queries:
        return shape
    quarter = lambda n: n and -(-n // 4)
    return shape._replace(
        length=quarter(shape.length), segment=quarter(shape.segment), window=quarter(shape.window)
    )


def spec_of(shape, rows):
    if shape.queries == 1:
        ones = np.ones((rows, shape.length), np.int32)
        places = Places(ones, np.cumsum(ones, axis=1, dtype=np.int32) - 1)
        return AttentionSpec(Places(*(a[:, -1:] for a in places[:2])), places)
    if shape.queries:  # beams: each sees what is its own
        last = np.arange(shape.length) >= shape.length - shape.queries
        own = np.arange(shape.length) == shape.length - 1 - np.arange(shape.queries)[:, None]
        return AttentionSpec(seen=jnp.asarray(np.tile(own | ~last, (rows, 1, 1))))
    if shape.segment is None:
        return EVERYTHING
    places = np.tile(np.arange(shape.length, dtype=np.int32), (rows, 1))
    return AttentionSpec.of(places // shape.segment + 1, places % shape.segment, shape.window)


def pairs(shape, rows):
    """How many pairs of tokens see each other in all rows."""
    mask = spec_of(shape, 1).mask()
    return rows * (shape.length**2 if mask is None else int(mask.sum()))


def seconds(f, *arrays):
    """The median of some runs, after one that compiles."""
    jax.block_until_ready(f(*arrays))
    found = []
    for _ in range(REPEATS):
        before = time.perf_counter()
        jax.block_until_ready(f(*arrays))
        found.append(time.perf_counter() - before)
    return statistics.median(found)


def measure(name, shape, rows, dtype, platform):
    """A line of figures, or why there are none."""
    rng, rows = np.random.default_rng(0), rows * shape.rows
    make = lambda n, *heads: jnp.asarray(rng.normal(size=(rows, *heads, n, shape.head_dim)), dtype)
    q = make(shape.queries or shape.length, shape.kv_heads, shape.group)
    k, v = make(shape.length, shape.kv_heads), make(shape.length, shape.kv_heads)
    spec, packed = spec_of(shape, rows), shape.segment not in (None, shape.length)
    if KERNELS[name].platform not in (None, platform):
        return f"cannot run: it is for {KERNELS[name].platform}, and this is {platform}"
    if why := KERNELS[name].refuses(need(q, k, spec, (0.0, None), packed)):
        return f"cannot run: it has no {why}"

    def forward(q, k, v):
        with using(Choice(name, packed=packed)):
            return attend(q, k, v, spec)

    if shape.queries:
        took = seconds(jax.jit(forward), q, k, v)
        return f"{took * 1e3:9.2f} ms {(k.nbytes + v.nbytes) / took / 1e9:9.1f} GB/s"
    both = jax.grad(lambda *qkv: forward(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    product = 2 * pairs(shape, rows) * shape.kv_heads * shape.group * shape.head_dim
    one, all_of_it = (seconds(jax.jit(f), q, k, v) for f in (forward, both))
    rate = lambda products, took: f"{took * 1e3:9.2f} ms {products * product / took / 1e9:9.0f} Gflop/s"
    return f"forward {rate(2, one)}   with backward {rate(6, all_of_it)}"


def main(rows="1", dtype=None):
    device = jax.devices()[0]
    dtype = dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    print(f"{device.device_kind}, {dtype}, rows: {rows}, jax {jax.__version__}")
    for what, shape in SHAPES.items():
        shape = shorter(shape) if device.platform == "cpu" else shape
        print(f"{what}: {shape.queries or shape.length} x {shape.length}, head_dim {shape.head_dim}")
        for name in KERNELS.names():
            try:
                said = measure(name, shape, int(rows), dtype, device.platform)
            except Exception as error:  # of a compiler or a driver, whatever they raise
                said = f"cannot run: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            print(f"  {name:8} {said}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
