"""Maps of one input as one, on their way from a checkpoint into a model that answers.

One product takes less time than several. What a module of the decoder names `together`, query, key and value
or gate and up, becomes its map `joined`. Outputs lie side by side along a dimension that stays whole on each
device: [kv_heads, group + 2, head_dim] and [2, mlp]. Nothing writes or trains such a map.
"""

import re
from collections.abc import Mapping, Sequence

from omnifusion_jax.checkpoints.storage.lazy_array import Lazy, side_by_side, with_axis, zeros
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.models import lora
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn import nnx

FACTORS = ("lora_a", "lora_b")


def joined(c: ModelConfig, arrays: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The parameters by path, stacked as in a checkpoint, with maps of one input joined.

    Those that are not kept alike stay apart: one of integers and one of values, say.
    """
    module, found = abstract(c), dict(arrays)
    for place in sorted({path.rsplit("/", 2)[0] for path in arrays if re.fullmatch(lora.KERNEL, path)}):
        names = getattr(nnx.owner(module, f"{place}/joined"), "together", ())
        maps = [beside(arrays, f"{place}/{name}/") for name in names]
        if not maps or not all(alike(maps[0], one) for one in maps):
            continue
        for name, one in zip(names, maps, strict=True):
            for key in one:
                del found[f"{place}/{name}/{key}"]
        found |= {f"{place}/joined/{key}": a for key, a in as_one(maps).items()}
    return found


def beside(arrays, prefix):
    """The arrays of one map by name."""
    return {path.removeprefix(prefix): a for path, a in arrays.items() if path.startswith(prefix)}


def alike(one, other):
    """Whether two maps can be one: of the same arrays but factors, of one type each, with the same inputs."""
    kept = [
        {key: (a.dtype, a.shape[:2]) for key, a in map.items() if key not in FACTORS} for map in (one, other)
    ]
    return kept[0] == kept[1] and "kernel_order" not in kept[0]


def as_one(maps: Sequence[Mapping[str, Lazy]]) -> dict[str, Lazy]:
    """The arrays of the map that does what `maps` do.

    A map whose outputs have no dimension to lie side by side along gets one. Each keeps its factors: they
    are blocks of the joined ones, beside zeros.
    """
    least = min(one["kernel"].ndim for one in maps)
    wide = lambda one, a: with_axis(a, -2) if one["kernel"].ndim == least else a
    outs = [{key: a if key == "lora_a" else wide(one, a) for key, a in one.items()} for one in maps]
    found = {key: side_by_side([one[key] for one in outs], -2) for key in outs[0] if key not in FACTORS}
    factored = [one for one in outs if "lora_a" in one]
    if factored:
        found["lora_a"] = side_by_side([one["lora_a"] for one in factored], -1)
        rows = [side_by_side([block(one, column) for column in outs], -2) for one in factored]
        found["lora_b"] = side_by_side(rows, 1)
    return found


def block(row, column):
    """What a joined lora_b [layers, rank, *outs] has from the lora_a of one map to the outputs of another."""
    b = row["lora_b"]
    if row is column:
        return b
    *_, side, last = column["kernel"].shape
    return zeros((*b.shape[:-2], side, last), b.dtype)
