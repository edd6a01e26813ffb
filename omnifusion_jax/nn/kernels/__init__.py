"""Kernels that never hold all scores at once: rows of `tables.KERNELS`."""

from omnifusion_jax.nn.kernels import cudnn, splash, triton

__all__ = ["cudnn", "splash", "triton"]
