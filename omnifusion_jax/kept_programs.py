"""Compiled programs are kept on the disk, so that nobody waits for one twice."""

import os
from pathlib import Path

import jax

LARGEST = 4 * 2**30  # bytes; then those that were not used for longest go


def keep_programs():
    """Keeps compiled programs in `omnifusion_jax/programs` of the user's cache directory.

    That is $XDG_CACHE_HOME, or else ~/.cache. Where JAX is told of another place already
    (JAX_COMPILATION_CACHE_DIR) that one holds them; JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "omnifusion_jax" / "programs"
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # hundreds of small ones add up
