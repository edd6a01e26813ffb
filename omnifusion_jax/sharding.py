"""Devices as a mesh, and which axis of it each dimension of an array is spread over.

Everything is `jax.jit` with `in_shardings` and `out_shardings` (what `pjit` became). Arrays name their dimensions by logical axes; one table maps
those to mesh axes.
"""

import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from omnifusion_jax.errors import ConfigError

RULES = {
    "batch": ("data", "fsdp"),
    "width": "fsdp",
    "vision_embed": "fsdp",
    "vocab": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}  # every other logical axis stays whole on each device


def make_mesh(data=1, fsdp=-1, tensor=1, devices=None):
    """A mesh with the axes data, fsdp, tensor.

    One size may be -1 for all the devices that remain; sizes that need fewer devices than there are take the first ones. Raises ConfigError when the
    sizes do not fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    known = math.prod(s for s in sizes.values() if s > 0)
    if -1 in sizes.values() and len(devices) % known == 0:
        sizes = {name: len(devices) // known if s == -1 else s for name, s in sizes.items()}
    needed = math.prod(sizes.values())
    if not 0 < needed <= len(devices):
        raise ConfigError(
            f"a mesh of {sizes} does not fit {len(devices)} devices; mesh.data * mesh.fsdp * mesh.tensor must be their number"
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices[:needed]
    )


def mesh_of(arrays):
    """The mesh that arrays are spread over, or None: NumPy arrays and those of one device have none."""
    shardings = (getattr(a, "sharding", None) for a in arrays)
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)


def ways(mesh, axis):
    """How many pieces a dimension of a logical axis is cut into."""
    name = RULES.get(axis)
    return math.prod(mesh.shape[n] for n in ((name,) if isinstance(name, str) else name)) if name else 1


def spec(mesh, axes, shape):
    """The PartitionSpec of an array by its logical axes. A dimension that its mesh axis does not divide stays whole."""
    names = []
    for axis, size in zip(axes, shape, strict=True):
        parts = ways(mesh, axis)
        names.append(RULES[axis] if parts > 1 and size % parts == 0 else None)
    return PartitionSpec(*names)


def sharding(mesh, axes, shape):
    return NamedSharding(mesh, spec(mesh, axes, shape))


def replicated(mesh):
    return NamedSharding(mesh, PartitionSpec())


def constrain(x, *axes):
    """Keeps an intermediate array spread by its logical axes, under `jax.set_mesh`; without a mesh it is `x`.

    Activations are spread over the batch alone: the compiler then gathers a layer's weights where they are used, rather than move activations.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))
