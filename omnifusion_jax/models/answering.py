"""A model in the form in which it answers: the layers of its decoder stand apart.

A scan over their stack would copy each layer's weights for every token.
"""

import collections
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from omnifusion_jax.config import ModelConfig, part_of
from omnifusion_jax.models import lora
from omnifusion_jax.models.omnifusion import OmniFusion, cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.linear import Linear
from omnifusion_jax.nn.stack import unstack

STACK = "decoder/layers/"


def answering(c: ModelConfig, arrays: Mapping, dtype) -> OmniFusion:
    """The model with the parameters `arrays` by path, of `dtype`; scales of integers stay as they are.

    The decoder's layers may be stacked there or stand apart (decoder/layers/0/...). Maps of one input may be
    joined. Beside a kernel there may be the scales of its integers, and factors that are multiplied by
    alpha / rank already.

    Raises: CheckpointError when these are not the parameters of the model.
    """
    arrays = apart(arrays, lambda a, i: a[i])
    typed = {path: a if lora.of_integers(path) else cast(a, dtype) for path, a in arrays.items()}
    return nnx.with_parameters(outline(c, arrays), jax.tree.map(jnp.asarray, typed))


def outline(c: ModelConfig, arrays: Mapping) -> OmniFusion:
    """The model in this form with shapes in place of its parameters; `arrays` have the layers apart."""

    def make():
        module = OmniFusion(c, rngs=nnx.Rngs(0))
        module.decoder.layers = unstack(module.decoder.layers)
        join(module, arrays)
        lora.make_room(module, arrays)
        return module

    return nnx.eval_shape(make)


def join(module: nnx.Module, arrays: Mapping):
    """Puts one map in the place of those that are joined among parameters by path."""
    for path in [path for path in arrays if path.endswith("/joined/kernel")]:
        owner = nnx.owner(module, path.removesuffix("/kernel"))
        first = getattr(owner, owner.together[0])
        outs = arrays[path].shape[len(first.ins) :]
        owner.joined = Linear(first.ins, outs, first.bias is not None, rngs=nnx.Rngs(0))
        for name in owner.together:
            setattr(owner, name, None)


def apart(arrays: Mapping, row: Callable) -> dict:
    """{path: array} with the decoder's layers apart, `row(a, i)` takes one of a stack."""
    found = {}
    for path, a in arrays.items():
        name = path.removeprefix(STACK)
        if name == path or name[0].isdigit():
            found[path] = a
        else:
            found |= {f"{STACK}{i}/{name}": row(a, i) for i in range(len(a))}
    return found


def weighed(module: nnx.Module) -> dict[str, int]:
    """Bytes of the parameters by part, as they are kept, over all devices together."""
    found = collections.Counter()
    for path, a in nnx.parameters(module).items():
        found[part_of(path)] += a.nbytes
    return dict(found)
