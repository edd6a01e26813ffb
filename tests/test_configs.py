"""Every file in configs/ gives valid configs in all its variants."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from absl import flags
from settings import changed

from omnifusion_jax import cli, shipped
from omnifusion_jax.config import HALF, EncoderConfig, GenerationConfig, ModelConfig, TrainConfig, from_dict, same_settings, to_json
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.models.presets import PRESETS, preset, resolve
from omnifusion_jax.nn import nnx
from omnifusion_jax.overrides import ConfigFlags
from omnifusion_jax.training import parts

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.py") if path.stem != "__init__")


def module(path):
    return shipped.module(str(path))


SOURCES = [f"{name}:{variant}".rstrip(":") for name in shipped.names() for variant in shipped.module(name).VARIANTS]


def test_every_file_has_its_name():
    assert shipped.names() == sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in FILES)


@pytest.mark.parametrize("source", SOURCES)
def test_it_is_valid_and_its_freeze_table_covers_the_model(source):
    config = shipped.load(source).validate()
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


REFUSED = [  # what is set in configs/pretrain.py, and what the message says
    ({"optimizer.name": "sgd"}, "optimizer.name is 'sgd'; choose from adamw, adafactor"),
    ({"optimizer.name": "adafactor", "optimizer.weight_decay": 0.1}, "weight_decay works with adamw only"),
    ({"optimizer.learning_rate": 0.0}, "learning_rate 0.0 is not positive"),
    ({"optimizer.warmup": 1.0}, r"in \[0, 1\), not 1.0"),
    ({"optimizer.warmup": -0.1}, r"in \[0, 1\), not -0.1"),
    ({"optimizer.horizon": 0.99}, "optimizer.horizon is 0.99"),
    ({"loss_mean_rows": 3}, "batch_size 256 is not a multiple of loss_mean_rows 3"),
    ({"loss_mean_rows": -1}, "loss_mean_rows -1"),
    ({"model.adapter.init": "zeros"}, "normal, torch"),
    ({"data.check": "always"}, "first_epoch, off"),
    ({"data.bad_share": -0.01}, "from 0 to 1, not -0.01"),
    ({"data.bad_share": 1.01}, "from 0 to 1, not 1.01"),
    ({"checkpoint.every_minutes": -1.0}, "must not be negative"),
    ({"data.on_bad_sample": "ignore"}, "raise, skip"),
    ({"data.path": ""}, "data.path is empty"),
    ({"data.max_length": 0}, r"data.max_length 0 is not in 1..32768"),
    ({"data.max_length": 32769}, r"data.max_length 32769 is not in 1..32768"),
    ({"model.layout": "other"}, "original"),
    ({"model.layout": "template"}, "model.layout=template, which needs one"),
    ({"model.template": "{{ messages }}"}, "model.template belongs to model.layout=template"),
    ({"model.encoder.activation": "relu"}, "quick_gelu"),
    ({"model.encoder.feature_layer": -26}, "outside -25..24"),
    ({"model.encoder.feature_layer": 25}, "outside -25..24"),
    ({"model.encoder.image_size": 13}, "image_size 13 is less than encoder.patch 14"),
    ({"model.encoder.shortest_edge": 335}, "shortest_edge 335 is less than encoder.image_size 336"),
    ({"model.encoder.heads": 3}, "encoder.embed 1024 is not a multiple of encoder.heads 3"),
    ({"model.encoder.class_token": False, "model.encoder.keep_class_token": True}, "keep_class_token needs encoder.class_token"),
    ({"model.encoder.post_norm": False, "model.encoder.feature_norm": True}, "feature_norm needs encoder.post_norm"),
    ({"model.adapter.kind": "sum"}, "'sum' takes 2 of the two encoders"),
    ({"model.adapter.dropout": 1.0}, r"adapter.dropout 1.0 is not in \[0, 1\)"),
    ({"model.adapter.width": 512}, "adapter.width: adapter.kind 'transformer' has the encoder's width"),
    ({"model.adapter.heads": 3}, "the adapter's width 1024 is not a multiple of adapter.heads 3"),
    ({"model.adapter.first_state": 25}, r"first_state 25 is not in 0..24"),
    ({"model.decoder.family": "gpt"}, "there is no decoder 'gpt'; choose from .*mistral"),
    ({"model.decoder.kv_heads": 5}, "decoder.heads 32 is not a multiple of decoder.kv_heads 5"),
    ({"model.decoder.head_dim": 65}, "head_dim 65 is odd"),
    ({"model.image.unpad": True}, "need image.fit=tiles"),
    ({"model.image.newline": True}, "need image.fit=tiles"),
    ({"model.image.fit": "tiles", "model.encoder.keep_class_token": True}, "image.fit=tiles: encoder.keep_class_token has no place"),
    ({"model.image.grids": ()}, "not pairs"),
    ({"model.image.grids": ((1, 2, 3),)}, "not pairs"),
    ({"model.image.grids": ((0, 2),)}, "not pairs"),
    ({"mesh.data": -1}, "mesh sizes"),  # fsdp is -1 already
    ({"mesh.tensor": 0}, "mesh sizes"),
    ({"checkpoint.every_steps": -1}, "must not be negative"),
    ({"checkpoint.every_minutes": -0.1}, "must not be negative"),
    ({"checkpoint.keep": 0}, "must be positive"),
    ({"checkpoint.final": "all"}, "trained, complete"),
    ({"eval.batch_size": 0}, "eval.batch_size and eval.max_new_tokens must be positive"),
    ({"eval.max_new_tokens": 0}, "eval.batch_size and eval.max_new_tokens must be positive"),
    ({"eval.path": "synthetic:held-out"}, "eval.count must be positive"),
    *[({name: 0}, f"{name} is 0; it must be positive") for name in ("steps", "batch_size", "grad_accum", "log_every", "max_bad_steps")],
    ({"grad_accum": 7}, "batch_size 256 is not a multiple of grad_accum"),
    ({"objective": "nonsense"}, "answers, patches"),
    ({"compute_dtype": "float16"}, "bfloat16, float32"),
    ({"remat": "some"}, "none, dots, full"),
    ({"train_parts": ()}, "train_parts is empty"),
    ({"train_parts": (("(adapter", 1.0),)}, r"train_parts: '\(adapter' is no regular expression: missing \)"),
]
ALLOWED = [  # at the edge
    {"model.encoder.feature_layer": -25},
    {"model.encoder.feature_layer": 24},
    {"model.encoder.image_size": 14},
    {"model.encoder.shortest_edge": 336},
    {"model.adapter.dropout": 0.0},
    {"model.adapter.first_state": 24},
    {"optimizer.warmup": 0.0},
    {"data.max_length": 32768},
    {"data.max_length": 1},
    {"mesh.data": -1, "mesh.fsdp": 1},
    {"grad_accum": 256},
    {"checkpoint.every_steps": 0, "checkpoint.every_minutes": 0.0, "checkpoint.keep": 1},
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: ",".join(value) if isinstance(value, dict) else "")
def test_settings_that_cannot_work_are_refused(values, message):
    config = changed(shipped.load("pretrain"), values)
    with pytest.raises(ConfigError, match=message):
        config.validate()


@pytest.mark.parametrize("values", ALLOWED, ids=str)
def test_settings_at_the_edge_are_allowed(values):
    assert changed(shipped.load("pretrain"), values).validate()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"num_beams": 2, "temperature": 0.1}, "beams are not sampled"),
        ({"top_p": 0.0}, "top_p 0.0 is not in"),
        ({"top_p": 1.1}, "top_p 1.1 is not in"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"seed": 2**32}, "seed 4294967296 is not in"),
        ({"seed": -1}, "seed -1 is not in"),
    ],
)
def test_generation_that_cannot_work_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**values)


def test_generation_at_the_edge_is_allowed():
    assert GenerationConfig(max_new_tokens=1, num_beams=1, temperature=0.1, top_p=1.0, top_k=0, no_repeat_ngram_size=0, seed=2**32 - 1)


def test_the_published_recipe():
    """The arguments of `generate` in the published code."""
    ends = {"ban_newline": True, "forced_eos": True}
    assert GenerationConfig.official() == GenerationConfig(50, 3, early_stopping=True, no_repeat_ngram_size=4, banned=("\n", "</s>", ":"), **ends)


def test_settings_of_two_checkpoints_are_compared_field_by_field():
    ours, theirs = EncoderConfig(), EncoderConfig(embed=512, mean=HALF, eps=1e-6)
    with pytest.raises(ConfigError) as caught:
        same_settings("model.encoder", ours, theirs, "there", but=("eps",))
    assert str(caught.value) == (
        "there was made with other settings than the config's model.encoder. To take them over: "
        "--config.model.encoder.embed=512 '--config.model.encoder.mean=(0.5, 0.5, 0.5)'"
    )
    taken = shlex.split(str(caught.value).partition("take them over: ")[2])  # as a shell reads it
    here = flags.FlagValues()
    config = ConfigFlags(here)
    cli.parsed(["train", "--config=pretrain", *taken], [], [config], here)
    same_settings("model.encoder", config.value.model.encoder, theirs, "there", but=("eps",))
    same_settings("model.encoder2", None, None, "there")
    with pytest.raises(ConfigError, match=r"there has a model\.encoder2, the config has none"):
        same_settings("model.encoder2", None, theirs, "there")
    with pytest.raises(ConfigError, match=r"there has no model\.encoder2, the config has one"):
        same_settings("model.encoder2", ours, None, "there")


def test_a_config_read_from_json_has_tuples_and_parts_that_may_be_missing():
    for c in (preset("omnifusion-1.1-mix"), preset("llava-next-mistral-7b")):
        assert from_dict(ModelConfig, json.loads(to_json(c))) == c


def test_nothing_is_said_twice_in_a_settled_encoder():
    c = EncoderConfig(image_size=336, shortest_edge=336, position_grid=24)
    assert c.settled() == EncoderConfig(image_size=336)
    other = EncoderConfig(image_size=336, shortest_edge=384, position_grid=16)
    assert other.settled() == other


def test_defaults_that_pages_promise():
    c = TrainConfig()
    assert (c.data.bad_share, c.data.check, c.data.on_bad_sample) == (0.01, "first_epoch", "raise")  # README: "more than 1 %"
    assert (c.checkpoint.every_minutes, c.loss_mean_rows, c.optimizer.horizon, c.model.adapter.init) == (0.0, 0, 1.0, "normal")
