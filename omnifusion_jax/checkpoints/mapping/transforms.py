"""Transforms between arrays of other libraries and ours, which only permute and reshape them."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pair of inverse array maps, `forward` on import and `backward` on export.

    Both only permute and reshape.
    """

    forward: Callable = lambda a: a
    backward: Callable = lambda a: a


SAME = Transform()

MATRIX = Transform(np.transpose, np.transpose)  # torch Linear [out, in] <-> ours [in, out]


def split_out(*dims: int) -> Transform:
    """torch [prod(dims), in] <-> ours [in, *dims]"""
    return Transform(lambda a: a.T.reshape(-1, *dims), lambda a: a.reshape(len(a), -1).T)


def split_in(*dims: int) -> Transform:
    """torch [out, prod(dims)] <-> ours [*dims, out]"""
    return Transform(lambda a: a.T.reshape(*dims, -1), lambda a: a.reshape(-1, a.shape[-1]).T)


def split(*dims: int) -> Transform:
    """torch [prod(dims)] <-> ours [*dims]"""
    return Transform(lambda a: a.reshape(dims), lambda a: a.reshape(-1))


class Fused(tuple):
    """A row of a table whose foreign tensor holds several of our arrays.

    It has (path, transform) of each array, in their order along the tensor's first axis.
    """

    def __new__(cls, *parts):
        return super().__new__(cls, parts)
