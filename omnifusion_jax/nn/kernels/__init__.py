"""Kernels that never hold all scores at once: rows of `tables.KERNELS`."""

from omnifusion_jax.nn.kernels import cudnn, paged, splash, triton

__all__ = ["cudnn", "paged", "splash", "triton"]
