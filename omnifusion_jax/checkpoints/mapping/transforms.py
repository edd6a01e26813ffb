"""How an array of another library and one of ours become each other: they are permuted and reshaped, nothing else."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pair of inverse array maps: `forward` on import, `backward` on export. They only permute and reshape."""

    forward: Callable = lambda a: a
    backward: Callable = lambda a: a


SAME = Transform()

MATRIX = Transform(np.transpose, np.transpose)  # torch Linear [out, in] <-> ours [in, out]


def split_out(*dims):
    """torch [prod(dims), in] <-> ours [in, *dims]"""
    return Transform(lambda a: a.T.reshape(-1, *dims), lambda a: a.reshape(len(a), -1).T)


def split_in(*dims):
    """torch [out, prod(dims)] <-> ours [*dims, out]"""
    return Transform(lambda a: a.T.reshape(*dims, -1), lambda a: a.reshape(-1, a.shape[-1]).T)


def split(*dims):
    """torch [prod(dims)] <-> ours [*dims]"""
    return Transform(lambda a: a.reshape(dims), lambda a: a.reshape(-1))


class Fused(tuple):
    """A row of a table whose foreign tensor holds several of our arrays: (path, transform) of each, in their order along its first axis."""

    def __new__(cls, *parts):
        return super().__new__(cls, parts)
