"""What turns encoder features into token embeddings: the rows of `tables.ADAPTERS`.

An adapter of your own is a class as `base.Adapter` describes it, put into the table by `@ADAPTERS.row("mine")` in a file
that your config file imports (examples/own_adapter.py).
"""

from omnifusion_jax.models.adapters import linear, mixed, resampler, transformer

__all__ = ["linear", "mixed", "resampler", "transformer"]
