"""Low-rank factors beside the decoder's kernels, and kernels of integers under them."""

import functools
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from omnifusion_jax.config import LoraConfig, ModelConfig, check
from omnifusion_jax.models.omnifusion import OmniFusion, abstract
from omnifusion_jax.nn import nnx, quantized
from omnifusion_jax.nn.init import zeros
from omnifusion_jax.nn.linear import Linear

KERNEL = r"decoder/layers/.*/kernel"  # those that can have factors, and be kept as integers
BEFORE_FACTORS = 1 << 20  # keys from this number on, of a key whose first ones are the adapter's
TABLES = {"decoder/embed": 1, "decoder/head": 0}  # by token; the dimension that is an embedding's
# What can stand beside a kernel of integers, and a scale beside TABLES, by the end of its path
BESIDE = ("/kernel_scale", "/kernel_zero", "/kernel_order", *(f"{table}_scale" for table in TABLES))


def targets(c: LoraConfig, paths: Iterable[str]) -> list[str]:
    """The paths of the kernels that have factors."""
    return [path for path in paths if c.rank and re.fullmatch(c.targets, path)]


def add_factors(module, c: LoraConfig, *, rngs: nnx.Rngs):
    """Puts factors beside the kernels of a module that `c.targets` matches.

    Raises: ConfigError when it matches nothing, or anything but kernels of linear maps of the decoder.
    """
    found = targets(c, nnx.parameters(module))
    check(bool(found or not c.rank), f"lora.targets: no parameter matches {c.targets!r}")
    for path in found:
        owner = nnx.owner(module, path)
        check(
            isinstance(owner, Linear) and re.fullmatch(KERNEL, path) is not None,
            f"lora.targets matches {path}, which is no kernel of a linear map in the decoder's layers",
        )
        owner.add_factors(c.rank, c.alpha, c.dropout, rngs=rngs)


def set_dropping(module, key):
    """Turns dropout before factors on in a module that is used for one pass: each map and layer has a key.

    A module as it is made, or read, has none: nothing is dropped in evaluation and in answers.
    """
    owners = [nnx.owner(module, path) for path in nnx.parameters(module) if path.endswith("/lora_a")]
    for i, owner in enumerate(owners):
        if owner.lora_dropout:
            own = jax.random.fold_in(key, BEFORE_FACTORS + i)
            owner.lora_key = nnx.Param(jax.random.split(own, owner.layers))


def outline(model: ModelConfig, c: LoraConfig):
    """The model with its factors, and with shapes in place of arrays."""

    def make():
        rngs = nnx.Rngs(0)
        module = OmniFusion(model, rngs=rngs)
        add_factors(module, c, rngs=rngs)
        return module

    return nnx.eval_shape(make)


def add_scales(module, paths: Iterable[str]):
    """Makes room for scales beside those of the kernels at `paths` that can be kept as integers."""
    found = [path for path in paths if re.fullmatch(KERNEL, path)]
    check(bool(found), "lora.base: no kernel of a decoder is frozen, so that none can be kept as integers")
    for path in found:
        owner = nnx.owner(module, path)
        check(owner.ins[-1] % 4 == 0, f"lora.base: {path} has {owner.ins[-1]} inputs, no multiple of 4")
        owner.add_scales()


def of_integers(path: str) -> bool:
    """Whether a parameter says what the integers of a kernel stand for."""
    return path.endswith(BESIDE)


def kernel_of(path: str) -> str:
    """The path of the kernel that such a parameter stands beside."""
    return path.rpartition("_")[0]


def make_room(module, arrays: Mapping):
    """Makes room in a module for what stands beside kernels among parameters by path: scales, and factors.

    The factors are multiplied by alpha / rank already.
    """
    for path, a in arrays.items():
        if of_integers(path):
            owner, kernel = nnx.owner(module, path), kernel_of(path)
            setattr(owner, path.rpartition("/")[2], zeros(*a.shape))
            if isinstance(owner, Linear) and path.endswith("_scale"):
                alone = f"{kernel}_zero" not in arrays and arrays[kernel].dtype == jnp.int8
                owner.by_output = alone and a.shape == owner.scales_shape(whole=True)
        elif path.endswith("/lora_a"):
            nnx.owner(module, path).add_factors(a.shape[-1], a.shape[-1], rngs=nnx.Rngs(0))


def scales_shapes(model: ModelConfig, whole: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of the scales that each kernel has if it is kept as integers, by the kernel's path.

    `whole`: one for each output, not one for each block of its inputs. Then the embeddings and the head can
    be integers too, with one for each token.
    """
    module = abstract(model)
    shapes = {path: a.shape for path, a in nnx.parameters(module).items()}
    owners = {path: nnx.owner(module, path) for path in shapes if re.fullmatch(KERNEL, path)}
    found = {p: owner.scales_shape(whole) for p, owner in owners.items() if isinstance(owner, Linear)}
    for path, width in TABLES.items():
        # A decoder of one's own may have no place for them.
        if whole and path in shapes and hasattr(module.decoder, f"{path.rpartition('/')[2]}_scale"):
            found[path] = tuple(1 if i == width else n for i, n in enumerate(shapes[path]))
    return found


def quantised(arrays: dict, kind: str) -> dict:
    """{path: array} with integers at the kernels that have room for scales beside them.

    Kernels are taken out of `arrays` one after the other, so that no two copies of all are held.
    """
    found = {}
    for path in [path for path in arrays if path.endswith("/kernel_scale")]:
        kernel = path.removesuffix("_scale")
        found[kernel], found[path] = quantise(arrays.pop(kernel), arrays.pop(path).shape, kind)
    return {**arrays, **found}


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantise(kernel, scales_shape, kind):
    """A stack of kernels as `quantized.quantise` gives them, one layer after the other."""
    return jax.lax.map(lambda layer: quantized.quantise(layer, scales_shape[1:], kind), kernel)


def merged(arrays: dict, c: LoraConfig, dtype) -> dict:
    """{path: array} of the plain model: kernels of integers as values, and factors added to their kernels.

    What is merged is of `dtype`, other arrays are as they were.
    """
    found = {}
    for path, a in arrays.items():
        if path.endswith(("/lora_a", "/lora_b", "/kernel_scale")):
            continue
        owner, _, name = path.rpartition("/")
        beside = {key: arrays.get(f"{owner}/{key}") for key in ("kernel_scale", "lora_a", "lora_b")}
        changes = name == "kernel" and any(b is not None for b in beside.values())
        found[path] = merge(a, **beside, scale=c.alpha / max(c.rank, 1), dtype=dtype) if changes else a
    return found


@functools.partial(jax.jit, static_argnames=("scale", "dtype"))
def merge(kernel, kernel_scale, lora_a, lora_b, scale, dtype):
    """A stack of kernels with its scales and factors, one layer after the other: values are float32."""

    def one(layer):
        kernel, kernel_scale, lora_a, lora_b = layer
        found = kernel if kernel_scale is None else quantized.values(kernel, kernel_scale)
        if lora_a is not None:
            found = found + scale * jnp.tensordot(lora_a, lora_b, 1, precision="highest")
        return found.astype(dtype)

    return jax.lax.map(one, (kernel, kernel_scale, lora_a, lora_b))
