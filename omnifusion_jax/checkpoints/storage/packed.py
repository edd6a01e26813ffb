"""Weights that GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) have left as integers, several in a word.

In place of a map's `weight` [out, in] there are, with `group` inputs of an output sharing a scale and a zero,

    qweight   int32: of GPTQ [in / n, out], of AWQ [in, out / n], with n integers of 4 or 8 bits in a word
    qzeros    int32[groups, out / n]; GPTQ keeps zero - 1, or in the format gptq_v2 the zero
    scales    float16[groups, out]
    g_idx     int32[in], of GPTQ alone: the group of each input

The lowest bits come first. A word of AWQ has the outputs 0 2 4 6 1 3 5 7. value = (integer - zero) * scale.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints.storage.lazy_array import Lazy, forget
from omnifusion_jax.checkpoints.storage.settings import read_json, require, section
from omnifusion_jax.errors import CheckpointError

SETTINGS = {  # what is read, by the method; a setting that is absent passes
    "gptq": {
        "bits": (4, 8),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "is_marlin_format": (False,),
        "pack_dtype": ("int32",),
        "dynamic": (None, {}),
    },
    "awq": {"bits": (4,), "version": ("gemm", "GEMM"), "zero_point": (True,)},
}
NAMES = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "awq": ("qweight", "qzeros", "scales")}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of AWQ: the outputs in a word, from its lowest bits on
ADVICE = (
    "Take the plain checkpoint that they were made from: its model card names it, "
    "and it is mostly the repository of the same name without -GPTQ, -AWQ or -4bit"
)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the weights of a directory are packed."""

    method: str  # a row of SETTINGS
    bits: int
    group: int  # -1: all inputs
    symmetric: bool  # whether zeros are the middle of the integers
    added: int  # to stored zeros


def packing(directory: Path) -> Packing | None:
    """What config.json, or AutoGPTQ's own file, says of packed weights; None: there are none.

    Raises:
      CheckpointError: weights are quantized in a way that is not read.
    """
    for name in ("config.json", "quantize_config.json"):
        file = directory / name
        settings = read_json(file) if file.is_file() else {}
        sections = [settings, *(section(settings, part, file) for part in ("text_config", "vision_config"))]
        inside = next(filter(None, (section(s, "quantization_config", file) for s in sections)), None)
        found = settings if name.startswith("quantize") else inside
        if found:
            return packing_of(found, file, "gptq" if found is settings else "some method")
    return None


def packing_of(settings: dict, where: Path, method: str) -> Packing:
    method = settings.get("quant_method", method)
    if method not in SETTINGS:
        how = f"{method}, {settings.get('bits', 'a few')} bits"
        raise CheckpointError(
            f"{where}: the weights are quantized ({how}), which is not supported; "
            f"{' and '.join(SETTINGS)} are. {ADVICE}"
        )
    if missing := {"bits", "group_size"} - settings.keys():
        raise CheckpointError(f"{where}: the settings of {method} lack {', '.join(sorted(missing))}")
    require(settings, SETTINGS[method], f"{where}, weights by {method}")
    group = settings["group_size"]
    if not isinstance(group, int) or (group < 1 and group != -1):
        raise CheckpointError(f"{where}: group_size is {group!r}; it is a number of inputs, or -1 for all")
    return Packing(
        method,
        settings["bits"],
        group,
        method == "gptq" and settings.get("sym", False),
        int(method == "gptq" and settings.get("checkpoint_format") != "gptq_v2"),
    )


class Packed(Lazy):
    """A map's weight [out, in], in the dtype of its scales.

    What it is made of, `integers`, `scales` and `zeros`, are Lazy arrays [out, in] too, whose inputs stand in
    `order`, group by group; `places` is the order for each output. Integers and zeros are int8, counted from
    the middle of their range.
    """

    def __init__(self, name: str, parts: Mapping[str, np.ndarray], how: Packing, where: str | Path):
        self.name, self.parts, self.how, self.where = name, parts, how, where
        n = 32 // how.bits  # integers in a word
        words = [parts[part] for part in ("qweight", "qzeros")]
        if any(a.dtype != np.int32 or a.ndim != 2 for a in words) or parts["scales"].dtype.kind in "iu":
            self.refuse(f"{', '.join(f'{part} is {a.dtype}{list(a.shape)}' for part, a in parts.items())}")
        rows, columns = parts["qweight"].shape
        outs, ins = (columns, rows * n) if how.method == "gptq" else (columns * n, rows)
        self.group = ins if how.group == -1 else how.group
        groups = ins // self.group
        wanted = {"qzeros": (groups, outs // n), "scales": (groups, outs), "g_idx": (ins,)}
        for part in wanted.keys() & parts.keys():
            if parts[part].shape != wanted[part] or ins % self.group or outs % n:
                self.refuse(f"{part} has shape {list(parts[part].shape)}, {list(wanted[part])} is needed")
        of_input = np.asarray(parts.get("g_idx", np.arange(ins) // self.group))
        if of_input.min() < 0 or not np.array_equal(np.bincount(of_input), [self.group] * groups):
            self.refuse(f"g_idx does not give {self.group} inputs to each of {groups} groups")
        self.order = np.argsort(of_input, kind="stable").astype(np.int32)
        self.ordered = np.array_equal(self.order, np.arange(ins))
        whole = lambda dtype, make: Lazy((outs, ins), dtype, lambda spans: make()[spans], name)
        self.integers = whole(np.int8, self.read_integers)
        self.scales = whole(parts["scales"].dtype, self.read_scales)
        self.zeros = whole(np.int8, self.read_zeros)
        self.places = whole(np.int32, lambda: np.broadcast_to(self.order, (outs, ins)))
        super().__init__((outs, ins), parts["scales"].dtype, lambda spans: self.read_values()[spans], name)

    def refuse(self, what: str):
        raise CheckpointError(f"{self.where}: {self.name}: {what}. Copy or download the directory again")

    def read_values(self):
        apart = self.read_integers() - np.float32(0 if self.how.symmetric else self.read_zeros())
        found = np.empty(self.shape, self.dtype)
        found[:, self.order] = apart * self.read_scales().astype(np.float32)
        return found

    def read_integers(self):
        words = self.part("qweight")
        codes = unpacked(words, self.how.bits, -2) if self.how.method == "gptq" else self.across(words)
        return self.signed(codes if self.ordered else codes[self.order]).T

    def read_scales(self):
        if self.how.symmetric:
            stored, middle = self.across(self.part("qzeros")), 1 << self.how.bits - 1
            if not any((stored == middle - added).all() for added in (0, 1)):  # some call gptq_v2 gptq
                self.refuse(f"sym is true, but not all zeros are {middle}")
        return self.for_inputs(self.part("scales"))

    def read_zeros(self):
        stored, most = self.across(self.part("qzeros")), (1 << self.how.bits) - 1
        if self.how.added and (stored == most).any():
            self.refuse(f"a zero is kept as {most}, which some read as 0 and others as {most + 1}")
        return self.for_inputs(self.signed(stored + np.uint8(self.how.added)))

    def part(self, name):
        """A copy of what is stored, whose pages are given back."""
        stored = self.parts[name]
        found = np.array(stored)
        forget(stored)
        return found

    def across(self, words):
        """Integers uint8[..., out] of words [..., out / n]."""
        found = unpacked(words, self.how.bits, -1)
        if self.how.method == "gptq":
            return found
        return found.reshape(*words.shape, -1)[..., np.argsort(ORDER)].reshape(found.shape)

    def signed(self, codes):
        """Integers uint8 as int8, counted from the middle of their range."""
        return (codes - np.uint8(1 << self.how.bits - 1)).view(np.int8)

    def for_inputs(self, a):
        """[groups, out] to [out, in]"""
        return np.repeat(a.T, self.group, axis=1)


def unpacked(words, bits: int, axis: int):
    """The integers uint8 of words int32, from the lowest bits on, along one of the dimensions, -1 or -2."""
    most, shape = (1 << bits) - 1, list(words.shape)
    pieces = [(words >> shift & most).astype(np.uint8) for shift in range(0, 32, bits)]
    shape[axis] *= len(pieces)
    return np.stack(pieces, axis=len(shape) if axis == -1 else -2).reshape(shape)


def idle(name: str, tensors: Mapping) -> bool:
    """Whether a tensor is a bias of zeros, which AutoGPTQ writes beside every packed weight."""
    beside = name.endswith(".bias") and isinstance(tensors.get(name.removesuffix("bias") + "weight"), Packed)
    return beside and not np.asarray(tensors[name]).any()


def with_packed(tensors: Mapping[str, np.ndarray], how: Packing | None, where: str | Path) -> Mapping:
    """The tensors, with a Packed `NAME.weight` for each `NAME.qweight` and what belongs to it.

    Raises:
      CheckpointError: a part is missing, or there are packed weights where `how` says that there are none.
    """
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if how is None or not names:
        if names or how:
            said = "nothing" if how is None else f"weights by {how.method}"
            raise CheckpointError(
                f"{where}: config.json says {said}, but there are {len(names)} tensors .qweight. "
                "Files of two checkpoints were mixed; download it again"
            )
        return tensors
    found, problems = dict(tensors), []
    for name in names:
        parts = {part: found.pop(f"{name}.{part}", None) for part in NAMES[how.method]}
        missing = [f"{name}.{part}: missing" for part, a in parts.items() if a is None]
        if not missing:
            found[f"{name}.weight"] = Packed(name, parts, how, where)
        problems += missing
    if problems:
        raise CheckpointError(f"{where}: weights by {how.method} lack tensors:\n  " + "\n  ".join(problems))
    return found
