"""Reads files written by `torch.save` without PyTorch and without running anything they contain.

Such a file is a zip archive: `<root>/data.pkl` is a pickle whose tensors refer to raw storages, and
`<root>/data/<key>` holds the bytes of each storage.

A pickle can call whatever it names, and `torch.load(weights_only=True)` has been broken twice
(CVE-2025-32434, CVE-2026-24747). Here a pickle can name only what `ALLOWED` lists: functions that rebuild
tensors, storage types, two containers, and inert stand-ins for the module classes of published OmniFusion
adapters. A hostile file can still exhaust memory or the stack, and so end this process, but it cannot
make the process run anything.
"""

import collections
import contextlib
import dataclasses
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import ClassVar

import ml_dtypes
import numpy as np

from omnifusion_jax.errors import CheckpointError

MAX_PICKLE_BYTES = 64 << 20  # a real pickle is far smaller, because tensors lie outside it

# torch stores entries uncompressed. This bounds what a repacked or hostile archive can make us allocate.
MAX_INFLATED_BYTES = 4 << 30

ZIP_START = b"PK\x03\x04"
CONVERT = (
    "Convert the file to safetensors on a trusted machine that has PyTorch and the classes it was saved with."
)
OLD_FORMAT = (
    "a file in the old torch.save format (before PyTorch 1.6). In a trusted environment with PyTorch run "
    "`torch.save(torch.load(f, weights_only=True), f2)` and use the new file."
)
FOREIGN = {  # how a file starts: what it is and what to do
    b"version https://git-lfs": (
        "a git-lfs pointer, not the file itself. Fetch the content with `git lfs pull`."
    ),
    # The pickle of the number 0x1950a86a20f9469cfc6c.
    b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19": OLD_FORMAT,
}


def read_torch_file(path: str | Path):
    """The object that a `torch.save` file holds.

    Containers, numbers and strings come as they are, tensors as numpy arrays, and modules as `TorchModule`s.

    Arrays are read-only views into the memory-mapped file, so the file may be larger than memory, and must
    not change while they are in use. Tensors that shared a storage still share it. bfloat16 is
    `ml_dtypes.bfloat16`. Parameters become plain arrays and lose attributes that were set on them.
    Tensor checksums are not verified.

    Raises:
      CheckpointError: the file is empty, truncated, inconsistent, of another format, or asks for anything
        that `ALLOWED` does not list; nothing was run.
      OSError: the file cannot be opened.
    """
    with open(path, "rb") as file, _errors_naming(path):
        _check_start(file.read(64))
        entries = _Entries(file)
        _check_byte_order(entries)
        return _Unpickler(entries).load()


def state_dict(module) -> dict[str, np.ndarray]:
    """The tensors of a `TorchModule`, named and ordered as torch's own `state_dict()` does it.

    A flat dict of tensors is copied as it is.

    Raises:
      CheckpointError: something in it is not a tensor, or modules contain each other.
    """
    try:
        tensors = dict(module if isinstance(module, dict) else _named_tensors(module, ""))
    except RecursionError:
        raise CheckpointError("the modules contain each other or are nested too deeply") from None
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise CheckpointError(
                f"entry {name!r:.200} is a {type(value).__name__}, not a named tensor. "
                "Pass the part that holds the weights."
            )
    return tensors


class TorchModule:
    """Stand-in for a pickled `torch.nn.Module`, whose subclasses are named as torch's classes.

    `state` is the module's attribute dict (`_parameters`, `_modules`, ...).
    """

    __slots__ = ("state",)

    def __new__(cls):
        self = super().__new__(cls)
        self.state = {}
        return self


def _named_tensors(module, prefix):
    """(name, value) pairs in registration order.

    Those are the module's own parameters, its own persistent buffers, then the same of its children.
    """
    transient = _section(module, "_buffers").keys() & module.state.get("_non_persistent_buffers_set", ())
    for name, value in [*_section(module, "_parameters").items(), *_section(module, "_buffers").items()]:
        if value is not None and name not in transient:
            yield f"{prefix}{name}", value
    for name, child in _section(module, "_modules").items():
        if child is not None:
            yield from _named_tensors(child, f"{prefix}{name}.")


def _section(module, name):
    section = module.state.get(name) if isinstance(module, TorchModule) else None
    if not isinstance(section, dict):
        raise CheckpointError(
            f"a {type(module).__name__} is not a torch module with {name}. "
            "Pass a module or a dict of tensors."
        )
    return section


@contextlib.contextmanager
def _errors_naming(path):
    """Turns whatever reading raises into a CheckpointError that starts with the file's name."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a malformed zip or pickle can raise almost any type
        reason = f"{type(error).__name__}: {error!s:.200}"
        raise CheckpointError(
            f"{path}: truncated, damaged, or not written by torch.save ({reason}). Copy or download it again."
        ) from error


def _check_start(start):
    if not start:
        raise CheckpointError("the file is empty. Copy or download it again.")
    for prefix, meaning in FOREIGN.items():
        if start.startswith(prefix):
            raise CheckpointError(f"this is {meaning}")
    if not start.startswith(ZIP_START):
        raise CheckpointError(
            f"not a torch.save file: those are zip archives, this one starts with {start[:8]!r}"
        )


def _check_byte_order(entries):
    if f"{entries.root}byteorder" not in entries.infos:  # PyTorch < 2.1 wrote none
        return
    order = entries.read("byteorder").tobytes()
    if order != b"little":
        raise CheckpointError(
            f"its byte order is {order!r:.30}, only b'little' is read. "
            "Save it again on a little-endian machine."
        )


class _Entries:
    """The entries of one torch archive, as read-only bytes."""

    def __init__(self, file):
        self.archive = zipfile.ZipFile(file)
        self.mapped = np.asarray(np.memmap(file, np.uint8, mode="r"))
        self.infos = {info.filename: info for info in self.archive.infolist()}
        self.root = _root(self.infos)
        self.inflated = {}
        if sum(info.file_size for info in self.infos.values() if not _is_raw(info)) > MAX_INFLATED_BYTES:
            raise CheckpointError(
                f"its compressed entries hold more than {MAX_INFLATED_BYTES} bytes. "
                "Repack it uncompressed (`zip -0 -r`)."
            )

    def info(self, name):
        if f"{self.root}{name}" not in self.infos:
            raise CheckpointError(f"the archive has no entry {name!a:.100}. Copy or download it again.")
        return self.infos[f"{self.root}{name}"]

    def read(self, name):
        """uint8[bytes] of the entry `<root>/<name>`."""
        info = self.info(name)
        if _is_raw(info):
            return self._map(info)
        if name not in self.inflated:
            self.inflated[name] = np.frombuffer(self.archive.read(info), np.uint8)
        return self.inflated[name]

    def _map(self, info):
        header = self.mapped[info.header_offset :][:30].tobytes()
        # The data follow the name and the extra field of the local header. Their lengths are read from that
        # header, because the copy in the central directory may differ.
        name_bytes = int.from_bytes(header[26:28], "little")
        extra_bytes = int.from_bytes(header[28:30], "little")
        start = info.header_offset + 30 + name_bytes + extra_bytes
        data = self.mapped[start:][: info.file_size]
        if not header.startswith(ZIP_START) or data.size != info.file_size:
            raise CheckpointError(
                f"the archive has no data for its entry {info.filename!a:.100}. Copy or download it again."
            )
        return data


def _is_raw(info):
    return info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1  # bit 0: encrypted


def _root(names):
    """The folder in which torch puts every entry, with its slash."""
    found = [name.removesuffix("data.pkl") for name in names if f"/{name}".endswith("/data.pkl")]
    if len(found) != 1:
        raise CheckpointError(
            f"a zip archive, but not one of torch.save: it has {len(found)} data.pkl entries instead of 1"
        )
    if any(name.startswith((f"{found[0]}constants.pkl", f"{found[0]}code/")) for name in names):
        raise CheckpointError(f"a TorchScript archive (torch.jit.save), which holds code. {CONVERT}")
    return found[0]


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    """Raw bytes and how to read them.

    Only `persistent_load` makes one, so a pickle cannot pass anything else off as memory.
    """

    dtype: np.dtype
    data: np.ndarray  # uint8[bytes]


def _rebuild_tensor(storage, offset, size, stride, requires_grad, hooks, metadata=None):
    """The view that `torch._utils._rebuild_tensor_v2` makes. `offset`, `size` and `stride` count elements."""
    if not isinstance(storage, _Storage):
        raise CheckpointError(
            f"a tensor is built on a {type(storage).__name__}, not on a storage. "
            "The file is damaged or hostile."
        )
    if metadata:  # the flags of a tensor whose conjugation or negation was not computed
        raise CheckpointError(
            f"a tensor carries the view flags {metadata!a:.100}. "
            "Save it again after .resolve_conj().resolve_neg()."
        )
    width = storage.dtype.itemsize
    room = storage.data.size // width
    if not _fits(room, offset, size, stride):
        view = f"size {size!a:.100}, stride {stride!a:.100}, offset {offset!a:.30}"
        advice = (
            "The file is damaged or hostile, "
            "or the tensor was an expanded view: then save its .contiguous() copy."
        )
        raise CheckpointError(f"a tensor of {view} does not fit its storage of {room} elements. {advice}")
    if 0 in size:
        return np.empty(size, storage.dtype)
    return np.ndarray(size, storage.dtype, storage.data, offset * width, [step * width for step in stride])


def _fits(room, offset, size, stride):
    """Whether a view has at most `room` elements, and all of them lie within a storage of `room` elements."""
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        return False
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    return 0 in size or (math.prod(size) <= room and last < room)


def _rebuild_parameter(data, requires_grad, hooks, state=None):
    return data


STORAGES = {
    "Float": "<f4", "Half": "<f2", "BFloat16": ml_dtypes.bfloat16, "Double": "<f8", "Long": "<i8",
    "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?",
}  # fmt: skip
MODULES = {
    "models": ["VisualToGPTMapping"],
    "__main__": ["VisualToGPTMapping"],
    "torch.nn.modules.activation": ["GELU", "MultiheadAttention", "ReLU"],
    "torch.nn.modules.container": ["ModuleList", "ParameterList", "Sequential"],
    "torch.nn.modules.dropout": ["Dropout"],
    "torch.nn.modules.linear": ["Linear", "NonDynamicallyQuantizableLinear"],
    "torch.nn.modules.normalization": ["LayerNorm"],
    "torch.nn.modules.transformer": ["TransformerEncoderLayer"],
}
ALLOWED = {  # everything that a pickle can name: (module, name) -> what it gets
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    # The value of a module's `activation` attribute. A string cannot be called.
    ("torch.nn.functional", "relu"): "torch.nn.functional.relu",
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,  # the spelling of pickle protocol 2
    **{("torch", f"{name}Storage"): np.dtype(dtype) for name, dtype in STORAGES.items()},
    **{
        (path, name): type(name, (TorchModule,), {"__slots__": ()})
        for path, names in MODULES.items()
        for name in names
    },
}


class _Unpickler(pickle._Unpickler):
    """The pure-Python unpickler with `ALLOWED` as its only names.

    Only the pure-Python one lets us override the opcodes that set attributes (BUILD) or bypass
    `find_class` (EXT).
    """

    def __init__(self, entries):
        if entries.info("data.pkl").file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"data.pkl is larger than {MAX_PICKLE_BYTES} bytes. {CONVERT}")
        super().__init__(io.BytesIO(entries.read("data.pkl").tobytes()))
        self.entries = entries

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise CheckpointError(
                f"the pickle asks for {f'{module}.{name}'!a:.200}, which is not known to be safe; "
                f"nothing was run. {CONVERT}"
            )
        return ALLOWED[module, name]

    def get_extension(self, code):
        raise CheckpointError(
            f"the pickle asks for extension {code}, which torch.save never writes; nothing was run. {CONVERT}"
        )

    def persistent_load(self, pid):
        match pid:
            # The fourth is the device that it was saved from.
            case ("storage", np.dtype() as dtype, str(key), str(), int(count)):
                data = self.entries.read(f"data/{key}")
            case _:
                raise CheckpointError(
                    f"a storage is described by {pid!a:.200}, not as torch.save does. "
                    "The file is damaged or hostile."
                )
        if data.size != count * dtype.itemsize:
            raise CheckpointError(
                f"storage {key!a:.100} has {data.size} bytes, "
                f"{count} elements of {dtype} need {count * dtype.itemsize}"
            )
        return _Storage(dtype, data)

    def load_build(self):
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, TorchModule) and isinstance(state, dict):
            target.state = state
        # A state dict carries the versions of its layers as `_metadata`, which are not needed.
        elif type(target) is not collections.OrderedDict or set(state) != {"_metadata"}:
            raise CheckpointError(
                f"the pickle sets attributes of a {type(target).__name__}; nothing was run. {CONVERT}"
            )

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}
