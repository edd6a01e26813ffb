"""What files of vision transformers have in common: tables made from names alone, and pictures prepared by the same few settings."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

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
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.config import EncoderConfig

CONVOLUTION = Transform(
    lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)
)  # [out, 3, p, p] <-> [p, p, 3, out]
QKV = ("layers/attention/query", "layers/attention/key", "layers/attention/value")
QKV_KERNEL, QKV_BIAS = (tuple(f"{path}/{name}" for path in QKV) for name in ("kernel", "bias"))


def ones_before(n):
    """torch [1, ..., 1, *dims] <-> ours [*dims]"""
    return Transform(lambda a: a.reshape(a.shape[n:]), lambda a: a.reshape(*(1,) * n, *a.shape))


BATCHED = {
    "class_token": ones_before(2),
    "position": ones_before(1),
    "registers": ones_before(1),
}  # most libraries keep a batch axis there


def named(tensors=(), linear=(), norms=()):
    """{name of a tensor: our path}, from names of tensors, of layers with a weight and a bias, and of norms. Several paths are a packed tensor."""
    found = dict(tensors)
    for theirs, ours in dict(linear).items():
        for name, of in (("weight", "kernel"), ("bias", "bias")):
            found[f"{theirs}.{name}"] = (
                tuple(f"{path}/{of}" for path in ours) if isinstance(ours, tuple) else f"{ours}/{of}"
            )
    for theirs, ours in dict(norms).items():
        found |= {f"{theirs}.weight": f"{ours}/scale", f"{theirs}.bias": f"{ours}/bias"}
    return found


def transforms(c: EncoderConfig):
    """How arrays of other libraries come to our shapes, by our path; those of other paths have them already."""
    heads, attention = (c.heads, c.width // c.heads), "layers/attention/"
    return {
        "patch/kernel": CONVOLUTION,
        **dict.fromkeys(QKV_KERNEL, split_out(*heads)),
        **dict.fromkeys(
            (*QKV_BIAS, attention + "query_norm/scale", attention + "key_norm/scale"), split(*heads)
        ),
        attention + "out/kernel": split_in(*heads),
        **{f"layers/feed_forward/{name}/kernel": MATRIX for name in ("up", "gate", "down")},
    }


@dataclasses.dataclass(frozen=True)
class Family:
    """A way in which vision towers are kept. A subclass says whether a path is one, and what its settings are."""

    styles: Callable[
        [EncoderConfig], tuple[dict, ...]
    ]  # what tensors are called, as `named` gives it; of several styles the first is written
    ignored: tuple[str, ...] = ()  # regexes of tensors that hold nothing of the tower
    prefix: str = ""  # what names may or may not begin with
    batched: bool = False  # class token, registers and positions have a batch axis

    known_by: ClassVar[str]

    def knows(self, path: Path) -> bool:
        """Whether a directory or a file is of this family. Reads settings and names only."""
        raise NotImplementedError

    def settings(self, path: Path) -> tuple[EncoderConfig, str]:
        """(config, how it is used to see pictures fitted: a value of ImageConfig.fit). Raises CheckpointError for what ours does not compute."""
        raise NotImplementedError

    def tensors(self, path: Path):
        return open_tensors(path)

    def table(self, c: EncoderConfig, path="image/encoders/0", style=0):
        """The rows of the parameters that the config has."""
        shapes, how = encoder_shapes(c), transforms(c) | (BATCHED if self.batched else {})
        rows = {}
        for name, ours in self.styles(c)[style].items():
            parts = ours if isinstance(ours, tuple) else (ours,)
            if all(part in shapes for part in parts):
                rows[name] = Fused(*((f"{path}/{part}", how.get(part, SAME)) for part in parts))
        return rows

    def read(self, source: Path, dtype=None, path="image/encoders/0"):
        """(EncoderConfig, {path: Lazy}).

        Raises:
          CheckpointError: a setting is not supported, or tensors do not fit (all are listed).
        """
        config, _ = self.settings(source)
        tensors = self.tensors(source)
        shapes = {f"{path}/{name}": shape for name, shape in encoder_shapes(config).items()}
        given = {name.removeprefix(self.prefix) for name in tensors}
        tables = [self.table(config, path, style) for style in range(len(self.styles(config)))]
        likest = max(
            tables,
            key=lambda rows: sum(
                name.removeprefix(self.prefix) in given for name in destinations(rows, shapes)
            ),
        )
        return config, from_foreign(
            tensors, likest, shapes, source, ignore=self.ignored, prefix=self.prefix, dtype=dtype
        )
