"""Tables of what varies."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

import omnifusion_jax as of
from omnifusion_jax import shipped
from omnifusion_jax.cli import command
from omnifusion_jax.cli.overrides import ConfigFlags
from omnifusion_jax.config import DecoderConfig, MeshConfig, ModelConfig, from_dict, to_json
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.models import contracts
from omnifusion_jax.models.adapters.base import Adapter
from omnifusion_jax.models.axes import axes
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn import nnx
from omnifusion_jax.tables import ADAPTERS, DECODERS, ENCODERS, SOURCES, Table
from omnifusion_jax.training import freeze


def test_a_row_is_put_in_by_decorator_and_by_assignment():
    table = Table("shape", rows={"round": 0})

    @table.row("square")
    class Square: ...

    table["flat"] = 2
    assert (table["round"], table["square"], table["flat"]) == (0, Square, 2)
    assert Square.__name__ == "Square"  # what is decorated stays what it is
    assert table.names() == ("round", "square", "flat")


def test_an_unknown_row_names_those_there_are():
    table = Table("shape", rows={"round": 0, "square": 1})
    with pytest.raises(ConfigError, match=r"^there is no shape 'flat'; choose from round, square$"):
        table["flat"]
    with pytest.raises(
        ConfigError, match="there is no adapter 'nothing'; choose from linear, mlp, transformer, "
    ):
        ADAPTERS["nothing"]


def test_a_table_brings_its_home_when_it_is_first_asked(tmp_path, monkeypatch):
    """One's own rows, put in before that, stay; a name of the home's own is the home's."""
    (tmp_path / "home_of_shapes.py").write_text(
        "import tables_of_shapes\ntables_of_shapes.SHAPES['round'] = 'theirs'\n"
    )
    (tmp_path / "tables_of_shapes.py").write_text(
        "from omnifusion_jax.tables import Table\nSHAPES = Table('shape', 'home_of_shapes', 'more_shapes')\n"
    )
    (tmp_path / "more_shapes.py").write_text("import tables_of_shapes\ntables_of_shapes.SHAPES['oval'] = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import tables_of_shapes

    table = tables_of_shapes.SHAPES
    table["mine"] = "mine"
    assert table["mine"] == "mine" and "home_of_shapes" not in sys.modules
    assert table["round"] == "theirs" and table.names() == ("mine", "round", "oval")


def test_the_shipped_rows_are_there_before_anything_else_is_imported():
    program = (
        "from omnifusion_jax.tables import ADAPTERS, DECODERS; "
        "print(ADAPTERS['mlp'].__name__, DECODERS['qwen3'].__name__, *ADAPTERS.names())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    names = ["linear", "mlp", "transformer", "concat", "sum", "attention", "resampler"]
    assert done.stdout.split() == ["MlpAdapter", "Decoder", *names]


@pytest.mark.parametrize(
    ("rows", "contract"),
    [(ENCODERS, contracts.Encoder), (DECODERS, contracts.Decoder), (ADAPTERS, Adapter)],
    ids=["encoder", "decoder", "adapter"],
)
def test_the_shipped_rows_keep_their_contract(rows, contract):
    """The same methods, with as many parameters and, after the first, of the same names."""
    promised = {
        name: f for name, f in vars(contract).items() if inspect.isfunction(f) and f.__module__ != "typing"
    }
    promised.pop("__subclasshook__", None)
    assert promised
    for name in rows.names():
        for method, f in promised.items():
            wanted, found = (list(inspect.signature(g).parameters) for g in (f, getattr(rows[name], method)))
            assert len(wanted) == len(found) and wanted[2:] == found[2:], f"{name}.{method}"


def test_a_decoder_of_ones_own_is_a_family():
    DECODERS["of mine"] = object
    try:
        DecoderConfig(family="of mine").validate()
    finally:
        del DECODERS["of mine"]
    with pytest.raises(ConfigError, match=r"there is no decoder 'of mine'; choose from .*mistral"):
        DecoderConfig(family="of mine").validate()


@pytest.fixture
def own_adapter():
    """The config file of examples/, whose row is taken out again."""
    yield str(Path(__file__).parents[1] / "examples/own_adapter.py")
    ADAPTERS.pop("squares", None)


def test_an_adapter_of_ones_own_has_flags_parts_and_rows(own_adapter):
    here = flags.FlagValues()
    section = ConfigFlags(here)
    command.parsed(
        ["train", f"--config={own_adapter}", "--config.model.image.adapter.factor=3"], [], [section], here
    )
    assert section.fields["model.image.adapter.factor"].meaning == "patches a side of a square"
    config = section.value.validate()
    c = config.model
    shipped.load(own_adapter)  # a run reads its file once more, and the row is another class then
    config.validate()
    assert (c.image.rows, c.image.side) == (4, 2)  # of six patches a side
    back = from_dict(ModelConfig, json.loads(to_json(c)))
    assert (back.image.adapter.kind, back.image.adapter.factor) == ("squares", 3)
    arrays = nnx.parameters(abstract(c))
    trained, _ = freeze.split(config.train_parts, arrays)
    assert (
        arrays["image/adapter/linear/kernel"].shape == (9 * 128, 128)
        and "image/adapter/linear/kernel" in trained
    )
    assert all(axes(path) for path in arrays)
    c.image.adapter.factor = 4
    with pytest.raises(ConfigError, match=r"adapter\.factor 4 does not divide a grid of 6 patches a side"):
        c.validate()


def test_an_adapter_of_ones_own_computes(own_adapter):
    """Here each row is what the linear map makes of nine neighbours, line by line."""
    c = shipped.load(own_adapter).model.image
    c.adapter.factor = 3
    module = ADAPTERS["squares"](c, 8, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 36, 128)).astype(np.float32)
    grid = x.reshape(6, 6, 128)
    rows = module(x)
    for row, column in np.ndindex(2, 2):
        square = grid[3 * row : 3 * row + 3, 3 * column : 3 * column + 3].reshape(-1)
        np.testing.assert_allclose(
            rows[0, 2 * row + column], square @ module.linear.kernel[...] + module.linear.bias[...], atol=1e-4
        )


def short(config, **settings):
    """A few steps on one device."""
    config.mesh, config.batch_size, config.steps, config.log_every, config.eval.count = (
        MeshConfig(1, 1),
        2,
        2,
        1,
        2,
    )
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def test_both_phases_train_an_adapter_of_ones_own(own_adapter, tmp_path):
    first = short(shipped.load(f"{own_adapter}:pretrain"))
    of.train(first, tmp_path / "one")
    second = short(shipped.load(f"{own_adapter}:sft"), init_from=str(tmp_path / "one" / "model"))
    assert of.train(second, tmp_path / "two")["eval/questions"] == 2
    c = of.load(tmp_path / "two" / "model").config
    assert (c.image.adapter.kind, c.image.rows) == ("squares", 9)


def test_a_source_of_ones_own_is_trained_on(tmp_path):
    try:
        config = short(shipped.load("examples/own_source.py"))
        assert config.data.path == "colours:8"
        assert of.train(config, tmp_path)["eval/questions"] == 2
        with pytest.raises(of.DataError, match="colours:many"):
            open_source("colours:many", "", 6)
    finally:
        SOURCES.pop("colours", None)
