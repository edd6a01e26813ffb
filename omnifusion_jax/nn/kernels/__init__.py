"""Kernels that never hold all scores at once: rows of `tables.KERNELS`."""

from omnifusion_jax.nn.kernels import cudnn, few, paged, splash, triton

__all__ = ["cudnn", "few", "paged", "splash", "triton"]
