"""Tables of what varies."""

import subprocess
import sys
from pathlib import Path

import pytest

from omnifusion_jax.config import DecoderConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.tables import ADAPTERS, DECODERS, Table


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
    with pytest.raises(ConfigError, match="there is no adapter 'nothing'; choose from linear, mlp, transformer, "):
        ADAPTERS["nothing"]


def test_a_table_brings_its_home_when_it_is_first_asked(tmp_path, monkeypatch):
    """One's own rows, put in before that, stay; a name of the home's own is the home's."""
    (tmp_path / "home_of_shapes.py").write_text("import tables_of_shapes\ntables_of_shapes.SHAPES['round'] = 'theirs'\n")
    (tmp_path / "tables_of_shapes.py").write_text("from omnifusion_jax.tables import Table\nSHAPES = Table('shape', 'home_of_shapes')\n")
    monkeypatch.syspath_prepend(tmp_path)
    import tables_of_shapes

    table = tables_of_shapes.SHAPES
    table["mine"] = "mine"
    assert table["mine"] == "mine" and "home_of_shapes" not in sys.modules
    assert table["round"] == "theirs" and table.names() == ("mine", "round")


def test_the_shipped_rows_are_there_before_anything_else_is_imported():
    program = "from omnifusion_jax.tables import ADAPTERS, DECODERS; print(ADAPTERS['mlp'].__name__, DECODERS['qwen3'].__name__, *ADAPTERS.names())"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    names = ["linear", "mlp", "transformer", "concat", "sum", "attention", "resampler"]
    assert done.stdout.split() == ["MlpAdapter", "Decoder", *names]


def test_a_decoder_of_ones_own_is_a_family():
    DECODERS["of mine"] = object
    try:
        DecoderConfig(family="of mine").validate()
    finally:
        del DECODERS["of mine"]
    with pytest.raises(ConfigError, match=r"there is no decoder 'of mine'; choose from .*mistral"):
        DecoderConfig(family="of mine").validate()
