"""What the families of vision transformers have in common: tables of tensors made from their names alone."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from omnifusion_jax.checkpoints.mapping.shapes import encoder_shapes
from omnifusion_jax.checkpoints.mapping.tensors import destinations, from_foreign
from omnifusion_jax.checkpoints.mapping.transforms import (
    MATRIX,
    SAME,
    Fused,
    Transform,
    split,
    split_in,
    split_out,
)
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.config import EncoderConfig

# torch [out, 3, p, p] <-> ours [p, p, 3, out]
CONVOLUTION = Transform(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))

QKV = ("layers/attention/query", "layers/attention/key", "layers/attention/value")
QKV_KERNEL, QKV_BIAS = (tuple(f"{path}/{name}" for path in QKV) for name in ("kernel", "bias"))


def ones_before(n):
    """torch [1, ..., 1, *dims] <-> ours [*dims]"""
    return Transform(lambda a: a.reshape(a.shape[n:]), lambda a: a.reshape(*(1,) * n, *a.shape))


# Most libraries keep a batch axis in these.
BATCHED = {"class_token": ones_before(2), "position": ones_before(1), "registers": ones_before(1)}


def named(tensors=(), linear=(), norms=()) -> dict[str, str | tuple[str, ...]]:
    """Our path by the name of a foreign tensor; a packed tensor has several paths.

    Args:
      tensors: our paths by names of tensors.
      linear: our paths by names of layers with a weight and a bias.
      norms: our paths by names of norms with a scale and a bias.
    """
    found = dict(tensors)
    for theirs, ours in dict(linear).items():
        for name, parameter in (("weight", "kernel"), ("bias", "bias")):
            if isinstance(ours, tuple):
                found[f"{theirs}.{name}"] = tuple(f"{path}/{parameter}" for path in ours)
            else:
                found[f"{theirs}.{name}"] = f"{ours}/{parameter}"
    for theirs, ours in dict(norms).items():
        found |= {f"{theirs}.weight": f"{ours}/scale", f"{theirs}.bias": f"{ours}/bias"}
    return found


def transforms(c: EncoderConfig) -> dict[str, Transform]:
    """The transforms between arrays of other libraries and ours, by our path. Other paths need none."""
    heads, attention = (c.heads, c.width // c.heads), "layers/attention/"
    by_head = (*QKV_BIAS, attention + "query_norm/scale", attention + "key_norm/scale")
    return {
        "patch/kernel": CONVOLUTION,
        **dict.fromkeys(QKV_KERNEL, split_out(*heads)),
        **dict.fromkeys(by_head, split(*heads)),
        attention + "out/kernel": split_in(*heads),
        **{f"layers/feed_forward/{name}/kernel": MATRIX for name in ("up", "gate", "down")},
    }


class EncoderFamily(Protocol):
    """A row of VISION_FAMILIES: a format in which vision towers are stored. `Family` has most of it."""

    known_by: str  # for errors: how a directory or a file of this family is recognised

    def knows(self, path: Path) -> bool:
        """Whether a directory or a file is of this family. Only settings and names are read."""

    def settings(self, path: Path) -> tuple[EncoderConfig, str]:
        """The encoder's config, and a value of ImageConfig.fit. Raises CheckpointError."""

    def read(
        self, source: Path, dtype=None, path: str = "image/encoders/0"
    ) -> tuple[EncoderConfig, dict[str, Lazy]]:
        """The encoder's config, and its arrays by path (under `path`). Raises CheckpointError."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What families of vision towers share.

    A subclass adds `known_by`, `knows` and `settings`, and so becomes an EncoderFamily.
    """

    # The names of tensors, as `named` gives them. A family may have several styles; the first one is written.
    styles: Callable[[EncoderConfig], tuple[dict, ...]]
    ignored: tuple[str, ...] = ()  # regexes of tensors that hold nothing of the tower
    prefix: str = ""  # what names may begin with, or may leave out
    batched: bool = False  # whether class token, registers and positions have a batch axis

    def tensors(self, path: Path) -> Mapping[str, np.ndarray]:
        return open_tensors(path)

    def table(self, c: EncoderConfig, path: str = "image/encoders/0", style: int = 0) -> dict[str, Fused]:
        """The table for the parameters that an encoder of config `c` has, with our paths under `path`."""
        shapes, how = encoder_shapes(c), transforms(c) | (BATCHED if self.batched else {})
        rows = {}
        for name, ours in self.styles(c)[style].items():
            parts = ours if isinstance(ours, tuple) else (ours,)
            if all(part in shapes for part in parts):
                rows[name] = Fused(*((f"{path}/{part}", how.get(part, SAME)) for part in parts))
        return rows

    def read(
        self, source: Path, dtype=None, path: str = "image/encoders/0"
    ) -> tuple[EncoderConfig, dict[str, Lazy]]:
        """The encoder's config, and its arrays by path (under `path`).

        Raises:
          CheckpointError: a setting is not supported, or tensors do not fit (all are listed).
        """
        config, _ = self.settings(source)
        tensors = self.tensors(source)
        shapes = {f"{path}/{name}": shape for name, shape in encoder_shapes(config).items()}
        given = {name.removeprefix(self.prefix) for name in tensors}
        tables = [self.table(config, path, style) for style in range(len(self.styles(config)))]

        def matches(table):
            return sum(name.removeprefix(self.prefix) in given for name in destinations(table, shapes))

        best = max(tables, key=matches)
        arrays = from_foreign(
            tensors, best, shapes, source, ignore=self.ignored, prefix=self.prefix, dtype=dtype
        )
        return config, arrays
