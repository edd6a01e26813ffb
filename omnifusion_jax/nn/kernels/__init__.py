"""Kernels that never hold all scores at once: rows of `tables.KERNELS`."""

from omnifusion_jax.nn.kernels import cudnn, few, loops, paged, splash, triton

__all__ = ["cudnn", "few", "loops", "paged", "splash", "triton"]
