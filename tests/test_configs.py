"""Every file in configs/ gives valid configs in all its variants."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from omnifusion_jax.config import ModelConfig, TrainConfig, from_dict, to_json
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.models.presets import PRESETS, preset, resolve
from omnifusion_jax.nn import nnx
from omnifusion_jax.training import parts

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.py") if path.stem != "__init__")


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


VARIANTS = [(path, name) for path in FILES for name in module(path).VARIANTS]


@pytest.mark.parametrize(("path", "name"), VARIANTS, ids=lambda value: getattr(value, "stem", value) or "default")
def test_it_is_valid_and_its_freeze_table_covers_the_model(path, name):
    config = module(path).get_config(name).validate()
    if config.objective == "answers":
        trained, frozen = parts.split(config.train_parts, nnx.parameters(abstract(config.model)))
        assert trained and frozen


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_unknown_variant_names_those_there_are(path):
    with pytest.raises(ConfigError, match="no variant 'nope'"):
        module(path).get_config("nope")


def test_the_papers_and_the_codes_settings():
    pretrain, sft = module(CONFIGS / "pretrain.py"), module(CONFIGS / "sft.py")
    settings = lambda c: (c.optimizer.name, c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup, c.batch_size)
    assert settings(pretrain.get_config()) == ("adamw", 1e-3, "cosine", 0.01, 256)
    assert settings(sft.get_config()) == ("adamw", 2e-5, "cosine", 0.01, 128)
    assert settings(pretrain.get_config("original")) == ("adafactor", 1e-2, "cosine", 0.01, 256)
    assert settings(sft.get_config("original")) == ("adafactor", 1e-4, "cosine", 0.01, 512)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name):
    c = preset(name)
    assert from_dict(ModelConfig, dataclasses.asdict(c)) == c
    assert '"layout"' in to_json(c)


def test_another_preset_by_name_keeps_what_else_was_changed():
    config = module(CONFIGS / "sft.py").get_config()
    config.model.preset, config.model.adapter.dropout, config.model.layout = "omnifusion-tiny", 0.3, "original"
    expected = preset("omnifusion-tiny")
    expected.adapter.dropout, expected.layout = 0.3, "original"
    assert resolve(config.model) == expected
    assert resolve(expected) is expected
    config.model.preset = "nope"
    with pytest.raises(ConfigError, match="choose from omnifusion"):
        resolve(config.model)


def test_unknown_fields_are_refused():
    with pytest.raises(ConfigError, match="no field nonsense"):
        from_dict(TrainConfig, {"nonsense": 1})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optimizer.name", "sgd", "adamw"),
        ("data.on_bad_sample", "ignore", "raise, skip"),
        ("model.layout", "other", "original"),
        ("model.encoder.activation", "relu", "quick_gelu"),
        ("model.encoder.feature_layer", -30, "outside"),
        ("grad_accum", 7, "multiple"),
        ("steps", 0, "steps"),
        ("train_parts", (), "train_parts is empty"),
    ],
)
def test_settings_that_cannot_work_are_refused(field, value, message):
    config = module(CONFIGS / "pretrain.py").get_config()
    at, (*parents, name) = config, field.split(".")
    for parent in parents:
        at = getattr(at, parent)
    setattr(at, name, value)
    with pytest.raises(ConfigError, match=message):
        config.validate()
