"""Adapters turn encoder features into token embeddings; each is a row of `tables.ADAPTERS`.

Your own adapter is a class that follows `base.Adapter`. Register it with `@ADAPTERS.row("mine")` in your
config file or in a module that it imports (examples/own_adapter.py).
"""

from omnifusion_jax.models.adapters import linear, mixed, resampler, transformer

__all__ = ["linear", "mixed", "resampler", "transformer"]
