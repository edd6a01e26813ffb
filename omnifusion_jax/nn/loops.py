"""Loops in C++ for a decoder's token on a CPU: products of a few rows, and attention of a few queries.

XLA shares such a product among threads late, rearranges a kernel before it multiplies several rows by it, and
gives attention to one core (docs/performance.md has figures). `loops.cc` is compiled where it runs, for that
processor, the first time that a program needs it, and kept in the user's cache directory. The environment
variable CXX names the compiler, as everywhere; CXX=false leaves all to XLA. Where they cannot be compiled
that is said, once, and XLA does it too.

A `Choice` that has "loops" allows both. Neither has a gradient.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import shlex
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib

from omnifusion_jax import kept_programs, sharding
from omnifusion_jax.nn.choice import NOW

MOST = 16  # rows of a product, as in loops.cc, and queries of an attention
WORTH = 2**16  # numbers of a kernel from which on threads are worth their start
PATIENCE = 300  # seconds for a compiler
SOURCE = Path(__file__).with_suffix(".cc")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared")
HANDLERS = {  # name for XLA: in loops.cc
    "omnifusion_product": "Product",
    "omnifusion_product_turned": "ProductTurned",
    "omnifusion_attention": "Attention",
}
BUILDING = threading.Lock()  # of two libraries XLA would refuse the second, when two threads trace at first


def product(x, kernel, contracted: int):
    """float32 x [..., *ins] times kernel [*ins, *outs]: [..., *outs]. `takes` says for which."""
    outs = kernel.shape[contracted:]
    x, shape = x.reshape(-1, math.prod(kernel.shape[:contracted])), (*x.shape[: x.ndim - contracted], *outs)
    kernel = kernel.reshape(x.shape[1], -1)
    return called("omnifusion_product", (len(x), kernel.shape[1]), x, kernel).reshape(shape)


def product_turned(x, kernel):
    """float32 x [..., ins] times kernel [outs, ins], transposed: [..., outs]. `takes` says for which."""
    outs, ins = kernel.shape
    x, shape = x.reshape(-1, ins), (*x.shape[:-1], outs)
    return called("omnifusion_product_turned", (len(x), outs), x, kernel).reshape(shape)


def called(name: str, shape: tuple[int, ...], *arrays):
    """What the loop `name` makes of arrays, float32 of a shape."""
    form = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(name, form, vmap_method="sequential")(*arrays)


def takes(x, kernel, contracted: int, *dtypes) -> bool:
    """Whether this product is one for these loops, where it is traced; `dtypes` are those of its result."""
    return (
        "loops" in NOW.value.kernels
        and {x.dtype, kernel.dtype, *map(jnp.dtype, dtypes)} == {jnp.dtype("float32")}
        and 0 < math.prod(x.shape[: x.ndim - contracted]) <= MOST
        and kernel.size >= WORTH
        and missing() is None
    )


def attention(q, k, v, seen):
    """Attention of float32 queries to a cache. Returns an array of q's shape.

    q [batch, kv_heads, group, query, head_dim], k and v [batch, kv_heads, key, head_dim], `seen`
    bool[batch, query, key]. A query that sees nothing gives zeros.
    """
    rows = lambda a: a.reshape(q.shape[0] * q.shape[1], -1, q.shape[-1])  # XLA copies a cache of other forms
    y = called("omnifusion_attention", rows(q).shape, rows(q), rows(k), rows(v), seen)
    return y.reshape(q.shape)


def missing() -> str | None:
    """What these loops lack where a program is traced; None: they can be called."""
    return compiled() if sharding.alone() else "loops for several devices"


@functools.cache
def compiled() -> str | None:
    """Compiles the loops, unless that was done before, and tells XLA of them. Returns None, or why not."""
    try:
        with BUILDING:
            library = ctypes.CDLL(str(build(kept_programs.folder("loops"))))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        failed = isinstance(error, subprocess.CalledProcessError)
        said = " ".join(((failed and error.stderr) or str(error)).split())
        if os.environ.get("CXX") != "false":  # which asks for this
            logging.getLogger(__name__).warning(
                "Answers in float32 are slower on this CPU than with a C++ compiler: %s", said[:300]
            )
        return f"compiled {SOURCE.name}"
    for name, handler in HANDLERS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, handler)), platform="cpu")
    return None


def build(folder: Path) -> Path:
    """The library that loops.cc makes for this processor, in a folder where it is kept.

    Raises:
      OSError: there is no compiler, or the folder cannot be written to.
      ValueError: CXX is no command line.
      subprocess.SubprocessError: it could not be compiled, and `stderr` says why, or that took too long.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    # errors="replace": what a compiler says may be in any encoding
    heard = {"capture_output": True, "text": True, "errors": "replace"}
    run = functools.partial(subprocess.run, check=True, timeout=PATIENCE, **heard)
    # all that the compiler defines: its version, and what the processor can do
    known = run([*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull]).stdout
    said = "\0".join((known, SOURCE.read_text(), *FLAGS, jaxlib.__version__))
    library = folder / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:  # so that none is ever seen half written
            made = Path(place, library.name)
            run([*compiler, *FLAGS, "-I", jax.ffi.include_dir(), "-o", str(made), str(SOURCE)])
            made.replace(library)
    return library
