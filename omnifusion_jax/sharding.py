"""Devices as a mesh, and the mesh axis that each dimension of an array is spread over.

Everything is `jax.jit` with `in_shardings` and `out_shardings` (what `pjit` became). Arrays name their
dimensions by logical axes; one table maps these to mesh axes.
"""

import contextlib
import contextvars
import math
import types
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from omnifusion_jax.errors import ConfigError

# Mesh axes by logical axis. Every other logical axis stays whole on each device.
RULES = {
    "batch": ("data", "fsdp"),
    "width": "fsdp",
    "vision_embed": "fsdp",
    "rank": "fsdp",
    "vocab": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}

# Where no dimension of an array can be cut by its rule, one of these is cut instead: 3200, the width of
# InternViT-6B, is no multiple of 256 devices, but its feed-forward width is.
INSTEAD = {"vision_mlp": "fsdp"}

# Up to RING devices the compiler for TPUs sums a product piece by piece, each on its way to where it belongs.
# For more it sums all of it on every device and cuts afterwards, unless it is asked for in two stages.
RING, SIDE = 32, 16  # SIDE: of a stage; the largest slices of two dimensions are 16 x 16 chips

# Rules that hold beside them while a program is traced, see `also`
ALSO = contextvars.ContextVar("also", default=types.MappingProxyType({}))


@contextlib.contextmanager
def also(**rules: str):
    """Adds rules while a program is traced in this context: `also(seq="tensor")`."""
    token = ALSO.set({**ALSO.get(), **rules})
    try:
        yield
    finally:
        ALSO.reset(token)


def rule(axis: str | None):
    """The mesh axes that a logical axis is spread over, as a PartitionSpec has them."""
    return ALSO.get().get(axis) or RULES.get(axis)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, dcn_data: int = 1, devices=None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor, over `devices` (None: all).

    One size may be -1 for all the devices that remain. If fewer devices are needed than there are, the first
    ones are taken; with several processes all must be needed. The axis data has `dcn_data * data` places:
    `dcn_data` slices of a TPU, or groups of hosts, each hold `data` copies, and only gradients pass between
    them. Raises ConfigError when the sizes do not fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data * dcn_data, "fsdp": fsdp, "tensor": tensor}
    if data == -1:
        sizes["data"] = -1
    known = math.prod(s for s in sizes.values() if s > 0)
    if -1 in sizes.values() and len(devices) % known == 0:
        sizes = {name: len(devices) // known if s == -1 else s for name, s in sizes.items()}
    needed = math.prod(sizes.values())
    if min(sizes.values()) < 1 or needed > len(devices):
        raise ConfigError(
            f"a mesh of {sizes} does not fit {len(devices)} devices; "
            "mesh.dcn_data * mesh.data * mesh.fsdp * mesh.tensor must be at most their number, "
            "and divide it if one is -1"
        )
    apart = {device.process_index for device in devices} - {d.process_index for d in devices[:needed]}
    if apart:
        raise ConfigError(
            f"a mesh of {sizes} takes {needed} of {len(devices)} devices and none of hosts "
            f"{', '.join(map(str, sorted(apart)))}. Use all, or start fewer hosts"
        )
    shape, how = tuple(sizes.values()), {"axis_types": (AxisType.Auto,) * 3}
    groups = slices(devices[:needed], dcn_data, sizes["data"])
    if groups == 1:
        return jax.make_mesh(shape, tuple(sizes), devices=devices[:needed], **how)
    inside = (sizes["data"] // groups, *shape[1:])
    return Mesh(
        mesh_utils.create_hybrid_device_mesh(
            inside, (groups, 1, 1), devices[:needed], allow_split_physical_axes=True
        ),
        tuple(sizes),
        **how,
    )


def slices(devices, dcn_data: int, copies: int) -> int:
    """How many slices of TPUs the devices are in; 1 when nothing but their hosts sets them apart.

    Raises: ConfigError when `dcn_data` groups do not fit them, or `copies` over all cannot be shared by them.
    """
    found = len({getattr(device, "slice_index", 0) for device in devices})
    hosts = len({device.process_index for device in devices})
    if devices[0].platform == "tpu" and found != dcn_data:
        raise ConfigError(f"mesh.dcn_data is {dcn_data}, but the number of slices is {found}: set it to that")
    if hosts % dcn_data and hosts > 1:
        raise ConfigError(f"mesh.dcn_data={dcn_data} groups cannot share {hosts} hosts evenly")
    if copies % dcn_data:
        raise ConfigError(f"mesh.dcn_data={dcn_data} groups cannot share {copies} copies evenly")
    return found if devices[0].platform == "tpu" else 1


def shares(mesh: Mesh, count: int) -> list[tuple[int, ...]]:
    """The rows of a batch of `count` that each process holds on its devices, by process.

    The order of devices in a mesh follows the wires of a TPU, so that the rows of a process need not follow
    one another. Processes that share the axis tensor hold the same rows. Raises ConfigError when two of them
    have some rows in common and others not.
    """
    if len({device.process_index for device in mesh.devices.flat}) == 1:
        return [tuple(range(count))]
    parts = ways(mesh, "batch")
    if count % parts:
        raise ConfigError(f"a batch of {count} rows cannot be shared evenly by {parts} devices (data * fsdp)")
    spread = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    held = {}
    for device, (rows,) in spread.devices_indices_map((count,)).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(count)))
    found = [tuple(sorted(held[process])) for process in sorted(held)]
    if sum(map(len, set(found))) != count or len(set(map(len, found))) > 1:
        raise ConfigError(
            f"a mesh of {dict(mesh.shape)} cuts batches so that hosts have some rows in common, others not. "
            "Choose mesh.tensor and mesh.fsdp so that each, or their product, fits a host"
        )
    return found


def owners(shares: Sequence[tuple[int, ...]]) -> list[int]:
    """The first process with each share: what they count together is counted once."""
    return sorted(shares.index(share) for share in set(shares))


def mesh_of(arrays) -> Mesh | None:
    """The mesh that arrays are spread over; None for NumPy arrays and for those on one device."""
    shardings = (getattr(a, "sharding", None) for a in arrays)
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)


def ways(mesh: Mesh, axis: str | None) -> int:
    """How many pieces a dimension with this logical axis is cut into."""
    return pieces(mesh, rule(axis))


def pieces(mesh: Mesh, names: str | tuple[str, ...] | None) -> int:
    """How many devices the named mesh axes have together."""
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(mesh.shape[name] for name in names)


def share(axis: str, size: int) -> int:
    """How much of a dimension of this logical axis a device has, under `jax.set_mesh`; else all of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return size if mesh.empty else size // ways(mesh, axis) or 1


def alone() -> bool:
    """Whether a program is traced for one device, as far as `jax.set_mesh` says."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def stages(rows: int) -> tuple[int, int, int] | None:
    """How rows of a batch are cut for a sum over the devices of `fsdp` in two stages, under `jax.set_mesh`.

    (data, first, second): devices that share the second index hold what is summed in the first stage. None
    where one stage will do: on GPUs, on few devices, for rows that are not spread.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device.platform != "tpu" or mesh.shape["fsdp"] <= RING:
        return None
    fsdp = mesh.shape["fsdp"]
    first = max(n for n in range(1, SIDE + 1) if fsdp % n == 0)
    return None if rows % ways(mesh, "batch") else (mesh.shape["data"], first, fsdp // first)


def spec(mesh: Mesh, axes, shape) -> PartitionSpec:
    """The PartitionSpec of an array, from its logical axes and its shape.

    A dimension that cannot be cut evenly stays whole; if all of them would, INSTEAD has another try.
    """
    names = [rule(axis) if cuts(mesh, rule(axis), n) else None for axis, n in zip(axes, shape, strict=True)]
    if not any(names):
        others = [INSTEAD.get(axis) for axis in axes]
        names = [name if cuts(mesh, name, n) else None for name, n in zip(others, shape, strict=True)]
    return PartitionSpec(*names)


def cuts(mesh: Mesh, names: str | tuple[str, ...] | None, size: int) -> bool:
    """Whether these mesh axes are of several devices and cut a dimension of `size` evenly."""
    parts = pieces(mesh, names)
    return parts > 1 and size % parts == 0


def sharding(mesh: Mesh, axes, shape) -> NamedSharding:
    return NamedSharding(mesh, spec(mesh, axes, shape))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def placed(shapes, shardings):
    """A tree of arrays or shapes as ShapeDtypeStructs with shardings, for which a program is lowered."""
    struct = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    return jax.tree.map(struct, shapes, shardings)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Keeps an intermediate array spread by its logical axes, under `jax.set_mesh`; else returns `x`.

    Activations are spread over the batch (and over "seq" between layers, where a run asks for it): the
    compiler then gathers a layer's weights where they are used, and does not move activations. The gradient
    of `x` lies as `x` does.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))
