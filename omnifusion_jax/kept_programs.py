"""Compiled programs are kept on the disk, so that nobody waits for one twice."""

import os
from pathlib import Path

import jax

LARGEST = 4 * 2**30  # bytes; then those that were not used for longest go


def folder(name: str) -> Path:
    """`omnifusion_jax/NAME` of the user's cache directory, which is $XDG_CACHE_HOME or else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "omnifusion_jax" / name


def keep_programs():
    """Keeps compiled programs in `omnifusion_jax/programs` of the user's cache directory.

    Where JAX is told of another place already (JAX_COMPILATION_CACHE_DIR) that one holds them;
    JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder("programs")))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # hundreds of small ones add up
