"""`read_torch_file` against torch's own files, and against files made to run code."""

import collections
import contextlib
import copyreg
import io
import itertools
import pathlib
import pickle
import struct
import subprocess
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from omnifusion_jax.checkpoints.storage import torch_files
from omnifusion_jax.checkpoints.storage.torch_files import TorchModule, read_torch_file, state_dict
from omnifusion_jax.errors import CheckpointError

REAL = pathlib.Path(__file__).parents[3].parent / "shared/data/omnifusion_1_1"
DTYPES = {
    "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64,
    "int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8, "uint8": np.uint8,
    "bool": np.bool_,
}  # fmt: skip


def saved(tmp_path, value, **kwargs):
    """What `read_torch_file` makes of `value` saved by torch."""
    torch = pytest.importorskip("torch")
    torch.save(value, tmp_path / "saved.pt", **kwargs)
    return read_torch_file(tmp_path / "saved.pt")


def as_numpy(tensor):
    torch = pytest.importorskip("torch")
    tensor = tensor.detach().contiguous()
    return (
        tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if tensor.dtype == torch.bfloat16
        else tensor.numpy()
    )


def assert_same(array, tensor):
    expected = as_numpy(tensor)
    assert type(array) is np.ndarray
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected, strict=True)


# Files as torch writes them.


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_round_trips(tmp_path, name):
    torch = pytest.importorskip("torch")
    tensor = torch.arange(24).reshape(2, 3, 4).sub(5).to(getattr(torch, name))
    array = saved(tmp_path, tensor)
    assert array.dtype == DTYPES[name]
    assert_same(array, tensor)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_containers_and_scalars_stay_as_they_are(tmp_path):
    pytest.importorskip("torch")
    value = {
        "epoch": 3,
        "loss": 0.5,
        "name": "\u043e\u0431",
        "list": [1, None, True],
        7: (1, 2),
        "big": 1 << 80,
        "set": {1, 2},
    }
    assert saved(tmp_path, value) == value


def test_other_pickle_protocols(tmp_path):
    torch = pytest.importorskip("torch")
    tensor = torch.arange(5.0)
    for protocol in (3, 4, 5):
        read = saved(tmp_path, {"a": tensor, "set": {1}}, pickle_protocol=protocol)
        assert read["set"] == {1}
        assert_same(read["a"], tensor)


def test_special_embeddings_form(tmp_path):
    torch = pytest.importorskip("torch")
    tokens = {
        name: torch.randn(16).div(4).bfloat16().requires_grad_() for name in ("USER", "BOT", "SOI", "EOI")
    }
    read = saved(tmp_path, tokens)
    assert list(read) == list(tokens)
    for name, tensor in tokens.items():
        assert_same(read[name], tensor)
    assert state_dict(read).keys() == tokens.keys()


def test_views_transposes_and_odd_shapes(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = {
        "transposed": base.transpose(0, 2),
        "sliced": base[1:, ::2, 3],
        "column": base[:, 1, 1],
        "scalar": base[2, 3, 4],
        "empty": base[:0],
        "permuted": base.permute(1, 2, 0)[::3],
        "windows": torch.arange(10).bfloat16().as_strided((2, 3), (2, 1)),
        "zero": torch.zeros(0, 7),
    }
    read = saved(tmp_path, views)
    for name, tensor in views.items():
        assert_same(read[name], tensor)


def test_shared_storages_stay_shared(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(12.0)
    read = saved(tmp_path, {"all": base, "tail": base[4:], "matrix": base.view(3, 4).T})
    assert_same(read["matrix"], base.view(3, 4).T)
    assert np.shares_memory(read["all"], read["tail"])
    assert np.shares_memory(read["all"], read["matrix"])


def test_arrays_outlive_the_reader_and_stay_in_the_file(tmp_path):
    torch = pytest.importorskip("torch")
    array = saved(tmp_path, torch.arange(1000.0))
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    assert array.sum() == 499500


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_repacked_archives(tmp_path, compression):
    torch = pytest.importorskip("torch")
    base = torch.randn(8, 8)
    torch.save({"a": base, "b": base.T}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", compression) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    read = read_torch_file(tmp_path / "b.pt")
    assert_same(read["b"], base.T)
    assert np.shares_memory(read["a"], read["b"])


def test_compressed_archives_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "MAX_INFLATED_BYTES", 1000)
    with pytest.raises(CheckpointError, match="Repack it uncompressed"):
        read_torch_file(
            archive(tmp_path, pickle.dumps({}, 2), {"data/0": bytes(2000)}, compression=zipfile.ZIP_DEFLATED)
        )


def test_state_dict_with_metadata(tmp_path):
    torch = pytest.importorskip("torch")
    linear = torch.nn.Linear(3, 2)
    read = state_dict(saved(tmp_path, linear.state_dict()))
    assert list(read) == ["weight", "bias"]
    assert_same(read["weight"], linear.weight)


# Whole modules.


@contextlib.contextmanager
def adapter_class():
    """`models.VisualToGPTMapping`, importable only while a file is written."""
    torch = pytest.importorskip("torch")

    class VisualToGPTMapping(torch.nn.Module):
        def __init__(self, width, embed, tokens, heads):
            super().__init__()
            self.transformer_layer = torch.nn.TransformerEncoderLayer(
                d_model=width, nhead=heads, batch_first=True, norm_first=False
            )
            self.linear = torch.nn.Linear(width, embed)
            self.n_embeddings = tokens

    VisualToGPTMapping.__module__, VisualToGPTMapping.__qualname__ = "models", "VisualToGPTMapping"
    module = types.ModuleType("models")
    module.VisualToGPTMapping = VisualToGPTMapping
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "models", module)
        yield VisualToGPTMapping


def assert_same_state(read, module):
    expected = module.state_dict()
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        assert_same(read[name], tensor)


@pytest.mark.parametrize("trained", [False, True])
def test_pickled_adapter(tmp_path, trained):
    torch = pytest.importorskip("torch")
    with adapter_class() as cls:
        module = cls(16, 24, 4, 4).bfloat16().train()
        if trained:  # gradients are not saved
            module.transformer_layer(torch.ones(1, 4, 16).bfloat16()).sum().backward()
        read = saved(tmp_path, module)
    assert isinstance(read, TorchModule)
    assert type(read).__name__ == "VisualToGPTMapping"
    assert read.state["n_embeddings"] == 4
    assert read.state["training"] is True
    layer = read.state["_modules"]["transformer_layer"]
    assert layer.state["activation"] == "torch.nn.functional.relu"
    assert layer.state["_modules"]["self_attn"].state["num_heads"] == 4
    assert_same_state(state_dict(read), module)


def test_pickled_containers_buffers_and_tied_weights(tmp_path):
    torch = pytest.importorskip("torch")
    nn = torch.nn
    linear = nn.Linear(2, 2, bias=False)
    linear.register_buffer("kept", torch.arange(3))
    linear.register_buffer("transient", torch.arange(3), persistent=False)
    linear.register_buffer("absent", None)
    module = nn.Sequential(
        linear,
        nn.GELU(),
        nn.ModuleList([nn.LayerNorm(2), linear]),
        nn.ReLU(),
        nn.ParameterList([torch.ones(2), torch.zeros(1)]),
        nn.Dropout(),
    )
    read = state_dict(saved(tmp_path, module))
    assert_same_state(read, module)
    assert np.shares_memory(read["0.weight"], read["2.1.weight"])


def test_parameter_with_attributes(tmp_path):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.note = "kept by torch"
    assert_same(saved(tmp_path, {"p": parameter})["p"], parameter)


def test_state_dict_refuses_what_is_not_tensors(tmp_path):
    with pytest.raises(CheckpointError, match="'epoch' is a int"):
        state_dict({"weight": np.zeros(2), "epoch": 3})
    with pytest.raises(CheckpointError, match="entry 1 is a ndarray"):
        state_dict({1: np.zeros(2)})
    with pytest.raises(CheckpointError, match="a list is not a torch module"):
        state_dict([np.zeros(2)])
    with pytest.raises(CheckpointError, match="Linear is not a torch module with _buffers"):
        state_dict(read_torch_file(archive(tmp_path, b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81.")))


def test_state_dict_refuses_cycles():
    module = TorchModule()
    module.state = {"_parameters": {}, "_buffers": {}, "_modules": {"self": module}}
    with pytest.raises(CheckpointError, match="contain each other"):
        state_dict(module)


# The real thing, and no torch.


@pytest.mark.skipif(
    not (REAL / "special_embeddings.pt").exists(), reason=f"no OmniFusion-1.1 files in {REAL}"
)
def test_real_special_embeddings():
    vectors = state_dict(read_torch_file(REAL / "special_embeddings.pt"))
    norms = {name: float(np.linalg.norm(vector.astype(np.float64))) for name, vector in vectors.items()}
    assert norms == pytest.approx({"USER": 1.0051, "BOT": 0.9803, "SOI": 1.0024, "EOI": 0.9946}, abs=1e-4)
    assert {(vector.shape, vector.dtype) for vector in vectors.values()} == {
        ((4096,), np.dtype(ml_dtypes.bfloat16))
    }


def test_torch_is_not_imported(tmp_path):
    path = archive(
        tmp_path,
        tensor_pickle(offset=0, size=(2, 3), stride=(1, 2)),
        {"data/0": np.arange(6, dtype="<f4").tobytes()},
    )
    code = f"""
import sys
sys.modules["torch"] = None  # importing it raises
from omnifusion_jax.checkpoints.storage.torch_files import read_torch_file
print(read_torch_file({str(path)!r}).tolist())
"""
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]"


# Hand-made files.


def archive(tmp_path, data_pkl, entries=(), compression=zipfile.ZIP_STORED):
    path = tmp_path / "made.pt"
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {"data.pkl": data_pkl, "byteorder": b"little", **dict(entries)}.items():
            if data is not None:
                file.writestr(f"made/{name}", data)
    return path


def push(value):
    """Opcodes that push an int, str, None, list, dict or tuple of such; bytes are opcodes already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(push, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(map(push, itertools.chain(*value.items()))) + b"u"
    return pickle.dumps(value, 2)[2:-1]


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
    return function + push(arguments) + b"R"


def build(target, state):
    return target + push(state) + b"b"


def storage(kind="FloatStorage", key="0", device="cpu", count=6, tag="storage"):
    return push((tag, name("torch", kind), key, device, count)) + b"Q"


def tensor(of=None, offset=0, size=(6,), stride=(1,), **metadata):
    extra = (metadata,) if metadata else ()
    return call(
        name("torch._utils", "_rebuild_tensor_v2"), of or storage(), offset, size, stride, False, {}, *extra
    )


def tensor_pickle(**kwargs):
    return b"\x80\x02" + tensor(**kwargs) + b"."


ORDERED = call(name("collections", "OrderedDict"))
LINEAR = name("torch.nn.modules.linear", "Linear")
REBUILD = name("torch._utils", "_rebuild_parameter")
SIX = {"data/0": bytes(24)}

HOSTILE = {  # opcodes, with MARKER for the file they would make, and what the error must name
    "os.system": (call(name("os", "system"), "touch MARKER"), "os.system"),
    "posix.system": (call(name("posix", "system"), "touch MARKER"), "posix.system"),
    "subprocess": (call(name("subprocess", "Popen"), ["touch", "MARKER"]), "subprocess.Popen"),
    "eval": (call(name("builtins", "eval"), "open('MARKER', 'w')"), "builtins.eval"),
    "exec, protocol 2": (call(name("__builtin__", "exec"), "open('MARKER', 'w')"), "__builtin__.exec"),
    "getattr": (
        call(name("builtins", "getattr"), call(name("builtins", "set")), "__class__"),
        "builtins.getattr",
    ),
    "open": (call(name("io", "open"), "MARKER", "w"), "io.open"),
    "torch.load": (call(name("torch", "load"), "MARKER"), "torch.load"),
    "torch.serialization": (call(name("torch.serialization", "load"), "MARKER"), "torch.serialization.load"),
    "numpy": (call(name("numpy.core.multiarray", "_reconstruct"), 0), "numpy.core.multiarray._reconstruct"),
    "dotted name": (
        b"\x80\x04"
        + push("torch.nn.functional")
        + push("os.system")
        + b"\x93"
        + push(("touch MARKER",))
        + b"R",
        "functional.os.system",
    ),
    "dotted module": (
        call(name("torch.nn.functional.os", "system"), "touch MARKER"),
        "torch.nn.functional.os.system",
    ),
    "name split elsewhere": (call(name("torch.nn", "functional.relu"), "MARKER"), "torch.nn.functional.relu"),
    "our own module": (
        name("omnifusion_jax.checkpoints.storage.torch_files", "io.open"),
        "omnifusion_jax.checkpoints.storage.torch_files.io.open",
    ),
    "method of an allowed class": (
        name("collections", "OrderedDict.fromkeys"),
        "collections.OrderedDict.fromkeys",
    ),
    "INST": (b"(" + push("touch MARKER") + b"ios\nsystem\n", "os.system"),
    "OBJ": (b"(" + name("os", "system") + push("touch MARKER") + b"o", "os.system"),
    "NEWOBJ": (name("subprocess", "Popen") + push((["touch", "MARKER"],)) + b"\x81", "subprocess.Popen"),
    "inside a module": (
        build(LINEAR + b")\x81", {}) + call(name("os", "system"), "touch MARKER"),
        "os.system",
    ),
    "control characters": (name("os", "sys\x1btem"), r"os.sys\x1btem"),
    "relu is not callable": (call(name("torch.nn.functional", "relu"), "MARKER"), "not callable"),
    "storage types are not callable": (call(name("torch", "FloatStorage"), 3), "not callable"),
    "EXT1": (b"\x82\x07", "extension 7"),
    "EXT2": (b"\x83\x07\x01", "extension 263"),
    "EXT4": (b"\x84\x07\x00\x00\x00", "extension 7"),
    "BUILD on an array": (
        build(tensor(), (1, (3,), name("torch", "FloatStorage"), False, "abc")),
        "attributes of a ndarray",
    ),
    "BUILD on a function": (
        build(REBUILD, (None, {"__defaults__": ("changed",)})),
        "attributes of a function",
    ),
    "BUILD on a class": (build(LINEAR, {"state": 1}), "attributes of a type"),
    "BUILD on a set": (build(call(name("builtins", "set")), {"add": 1}), "attributes of a set"),
    "BUILD on a storage": (build(storage(), {"data": 1}), "attributes of a _Storage"),
    "BUILD on a dict with methods": (build(ORDERED, {"items": REBUILD}), "attributes of a OrderedDict"),
    "BUILD with slots": (build(LINEAR + b")\x81", (None, {"__class__": LINEAR})), "attributes of a Linear"),
    "assignment into an array": (tensor() + push(0) + push(7) + b"s", "read-only"),
    "persistent id as text": (b"Pstorage\n", "a storage is described by 'storage'"),
    "persistent id, wrong tag": (storage(tag="module"), "a storage is described by"),
    "persistent id, wrong type": (
        push(("storage", "torch.FloatStorage", "0", "cpu", 6)) + b"Q",
        "a storage is described by",
    ),
    "persistent id, wrong length": (
        push(("storage", name("torch", "FloatStorage"), "0")) + b"Q",
        "a storage is described by",
    ),
    "storage elsewhere": (storage(key="../../etc/passwd"), "no entry 'data/../../etc/passwd'"),
    "storage missing": (storage(key="1"), "no entry 'data/1'"),
    "storage too long": (storage(count=7), "has 24 bytes, 7 elements of float32 need 28"),
    "storage too short": (storage(count=5), "has 24 bytes, 5 elements"),
    "storage of another type": (storage(kind="DoubleStorage"), "6 elements of float64 need 48"),
    "storage of negative length": (storage(count=-6), "-6 elements"),
    "tensor on a tensor": (tensor(of=tensor()), "built on a ndarray"),
    "tensor on bytes": (tensor(of=push("abcdef")), "built on a str"),
    "offset past the end": (tensor(offset=1), "does not fit"),
    "negative offset": (tensor(offset=-1), "does not fit"),
    "stride past the end": (tensor(size=(2, 2), stride=(5, 1)), "does not fit"),
    "negative stride": (tensor(offset=5, stride=(-1,)), "does not fit"),
    "negative size": (tensor(size=(-1,)), "does not fit"),
    "huge stride": (tensor(size=(2,), stride=(1 << 63,)), "does not fit"),
    "larger than its storage": (tensor(size=(1 << 40,), stride=(0,)), "does not fit"),
    "lengths differ": (tensor(size=(2, 3), stride=(1,)), "does not fit"),
    "sizes that are not numbers": (tensor(size=("a",), stride=("b",)), "does not fit"),
    "conjugated view": (tensor(conj=True), "resolve_conj"),
    "quantized tensor": (call(name("torch._utils", "_rebuild_qtensor"), storage()), "_rebuild_qtensor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)  # what they would run makes MARKER here
    defaults = torch_files._rebuild_parameter.__defaults__
    opcodes, reason = HOSTILE[case]
    path = archive(tmp_path, b"\x80\x02" + opcodes + b".", SIX)
    with pytest.raises(CheckpointError) as refused:
        read_torch_file(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert reason in str(refused.value)
    assert not (tmp_path / "MARKER").exists()
    assert torch_files._rebuild_parameter.__defaults__ == defaults


@pytest.mark.parametrize(
    "case", ["os.system", "posix.system", "eval", "exec, protocol 2", "open", "INST", "OBJ", "dotted name"]
)
def test_the_hostile_pickles_would_work(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    opcodes = HOSTILE[case][0].replace(
        push("torch.nn.functional"), push("pathlib")
    )  # any module that imports os does
    pickle.loads(b"\x80\x02" + opcodes + b".")
    assert (tmp_path / "MARKER").exists()


def test_registered_extensions_are_refused_too(tmp_path):
    copyreg.add_extension("os", "system", 7)
    try:
        code = b"\x80\x02\x82\x07."
        assert callable(pickle.loads(code))  # and now it is cached, so that find_class is no longer asked
        with pytest.raises(CheckpointError, match="extension 7"):
            read_torch_file(archive(tmp_path, code))
    finally:
        copyreg.remove_extension("os", "system", 7)
        copyreg._extension_cache.pop(7, None)


def test_refusal_says_what_to_do(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"asks for 'evil\.Class'.*nothing was run.*safetensors on a trusted machine"
    ):
        read_torch_file(archive(tmp_path, b"\x80\x02" + name("evil", "Class") + b"."))


def test_unknown_module_classes_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.conv\.Conv2d"):
        saved(tmp_path, torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(CheckpointError, match=r"torch\.ComplexFloatStorage"):
        saved(tmp_path, torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(CheckpointError, match="contiguous"):
        saved(tmp_path, torch.zeros(1).expand(5))


def test_all_that_a_pickle_can_name():
    """The list in full: whoever adds to it answers for what the name lets a hostile file do."""
    kinds = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
    assert {f"{module}.{name}" for module, name in torch_files.ALLOWED} == {
        f"torch.{kind}Storage" for kind in kinds
    } | {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch.nn.functional.relu",
        "collections.OrderedDict",
        "builtins.set",
        "__builtin__.set",
        "models.VisualToGPTMapping",
        "__main__.VisualToGPTMapping",
        "torch.nn.modules.activation.GELU",
        "torch.nn.modules.activation.MultiheadAttention",
        "torch.nn.modules.activation.ReLU",
        "torch.nn.modules.container.ModuleList",
        "torch.nn.modules.container.ParameterList",
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.dropout.Dropout",
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
        "torch.nn.modules.normalization.LayerNorm",
        "torch.nn.modules.transformer.TransformerEncoderLayer",
    }
    stand_ins = {
        given
        for given in torch_files.ALLOWED.values()
        if isinstance(given, type) and issubclass(given, TorchModule)
    }
    assert all(set(vars(given)) <= {"__module__", "__slots__", "__doc__"} for given in stand_ins)
    assert {given for given in torch_files.ALLOWED.values() if callable(given)} - stand_ins == {
        torch_files._rebuild_tensor, torch_files._rebuild_parameter, collections.OrderedDict, set,
    }  # fmt: skip


# Files that are not what they should be.

OLD_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
NOT_ARCHIVES = {
    "empty": (b"", "empty"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "old": (
        OLD_MAGIC + pickle.dumps(1001, 2),
        r"old torch.save format .*torch.save\(torch.load\(f, weights_only=True\), f2\)",
    ),
    "bare pickle": (pickle.dumps({}, 2), "not a torch.save file"),
    "web page": (b"<!DOCTYPE html>", "starts with b'<!DOCTYP'"),
    "zip start only": (b"PK\x03\x04" + bytes(100), "truncated"),
}


@pytest.mark.parametrize("case", NOT_ARCHIVES)
def test_other_files_are_named(tmp_path, case):
    content, reason = NOT_ARCHIVES[case]
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as refused:
        read_torch_file(path)
    assert str(path) in str(refused.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "none.pt")


def test_real_old_format(tmp_path):
    torch = pytest.importorskip("torch")
    with pytest.raises(CheckpointError, match="the old torch"):
        saved(tmp_path, {"a": torch.ones(3)}, _use_new_zipfile_serialization=False)


EMPTY = pickle.dumps({}, 2)
WRONG_ARCHIVES = {
    "no data.pkl": (None, {"weights": b"x"}, "0 data.pkl"),
    "two data.pkl": (EMPTY, {"again/data.pkl": EMPTY}, "2 data.pkl"),
    "TorchScript constants": (EMPTY, {"constants.pkl": EMPTY}, "TorchScript"),
    "TorchScript code": (EMPTY, {"code/__torch__.py": b""}, "TorchScript"),
    "big-endian": (EMPTY, {"byteorder": b"big"}, "byte order is b'big'"),
    "cut pickle": (tensor_pickle()[:-20], SIX, "truncated, damaged"),
    "no pickle": (b"hello", {}, "truncated, damaged"),
    "empty pickle": (b"", {}, "truncated, damaged"),
}


@pytest.mark.parametrize("case", WRONG_ARCHIVES)
def test_wrong_archives(tmp_path, case):
    data_pkl, entries, reason = WRONG_ARCHIVES[case]
    with pytest.raises(CheckpointError, match=reason):
        read_torch_file(archive(tmp_path, data_pkl, entries))


def test_before_byteorder_was_written(tmp_path):
    assert read_torch_file(archive(tmp_path, EMPTY, {"byteorder": None})) == {}


def test_pickle_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "MAX_PICKLE_BYTES", 10)
    with pytest.raises(CheckpointError, match="larger than 10 bytes"):
        read_torch_file(archive(tmp_path, tensor_pickle(), SIX))


@pytest.mark.parametrize("kept", [5, 40, 200, 0.5, 0.9, -1])
def test_truncated(tmp_path, kept):
    path = archive(tmp_path, tensor_pickle(), SIX)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match="truncated"):
        read_torch_file(path)


def test_entry_that_points_outside_the_file(tmp_path):
    path = archive(tmp_path, tensor_pickle(), SIX)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        start = file.getinfo("made/data/0").header_offset
    content[start + 28 : start + 30] = struct.pack("<H", 0xFFFF)  # the local header's extra field
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="no data for its entry 'made/data/0'"):
        read_torch_file(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_bytes_raise_only_checkpoint_errors(tmp_path, monkeypatch, compression):
    monkeypatch.chdir(tmp_path)
    content = archive(tmp_path, tensor_pickle(size=(2, 3), stride=(3, 1)), SIX, compression).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(700):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[rng.integers(len(content), size=rng.integers(1, 4))] = rng.integers(256)
        (tmp_path / "damaged.pt").write_bytes(damaged.tobytes())
        try:
            read_torch_file(tmp_path / "damaged.pt")
        except CheckpointError:
            refused += 1
    assert refused > 100
