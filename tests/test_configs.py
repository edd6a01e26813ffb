"""Every file in configs/ gives valid configs in all its variants."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from absl import flags
from settings import changed

from omnifusion_jax import shipped
from omnifusion_jax.cli import command
from omnifusion_jax.cli.overrides import ConfigFlags
from omnifusion_jax.config import (
    HALF,
    EncoderConfig,
    GenerationConfig,
    ImageConfig,
    ModelConfig,
    TrainConfig,
    adapter,
    from_dict,
    part_of,
    same_settings,
    to_json,
)
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.models.presets import PRESETS, preset, resolve
from omnifusion_jax.nn import nnx
from omnifusion_jax.tables import ADAPTERS
from omnifusion_jax.training import freeze
from omnifusion_jax.training.program import build

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.py") if path.stem != "__init__")


def module(path):
    return shipped.module(str(path))


SOURCES = [
    f"{name}:{variant}".rstrip(":") for name in shipped.names() for variant in shipped.module(name).VARIANTS
]


def test_every_file_has_its_name():
    assert shipped.names() == sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in FILES)


@pytest.mark.parametrize("source", SOURCES)
def test_it_is_valid_and_its_freeze_table_covers_the_model(source):
    config = shipped.load(source).validate()
    if config.objective == "answers":
        module = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
        trained, frozen = freeze.split(config.train_parts, nnx.parameters(module))
        assert trained and bool(frozen) == any(factor is None for _, factor in config.train_parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_unknown_variant_names_those_there_are(path):
    with pytest.raises(ConfigError, match="no variant 'nope'"):
        module(path).get_config("nope")


def test_the_papers_and_the_codes_settings():
    pretrain, sft = module(CONFIGS / "pretrain.py"), module(CONFIGS / "sft.py")
    settings = lambda c: (
        c.optimizer.name,
        c.optimizer.learning_rate,
        c.optimizer.schedule,
        c.optimizer.warmup,
        c.batch_size,
    )
    assert settings(pretrain.get_config()) == ("adamw", 1e-3, "cosine", 0.01, 256)
    assert settings(sft.get_config()) == ("adamw", 2e-5, "cosine", 0.01, 128)
    assert settings(pretrain.get_config("original")) == ("adafactor", 1e-2, "cosine", 0.01, 256)
    assert settings(sft.get_config("original")) == ("adafactor", 1e-4, "cosine", 0.01, 512)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name):
    """With as many encoders as it has, and with the settings of its kind of adapter."""
    c = preset(name)
    for values in (dataclasses.asdict(c), json.loads(to_json(c))):
        found = from_dict(ModelConfig, values)
        assert found == c and type(found.image.adapter) is ADAPTERS[c.image.adapter.kind].Settings
        assert all(type(encoder) is EncoderConfig for encoder in found.image.encoders)
    assert '"layout"' in to_json(c)


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_s_config_survives_json(source):
    config = shipped.load(source)
    assert from_dict(TrainConfig, json.loads(to_json(config))) == config


@pytest.mark.parametrize("kind", ADAPTERS.names())
def test_settings_of_every_kind_of_adapter_survive_json(kind):
    """Changed ones too; those of another kind are another config, and their fields are refused."""
    c = ModelConfig(image=ImageConfig(adapter=adapter(kind)))
    for field, value in vars(c.image.adapter).items():
        if field != "kind":
            changes = {bool: not value, int: 7, float: 0.25, str: "other", type(None): 7}
            setattr(c.image.adapter, field, changes[type(value)])
    assert from_dict(ModelConfig, json.loads(to_json(c))) == c
    values = dataclasses.asdict(c)
    values["image"]["adapter"]["nonsense"] = 1
    with pytest.raises(ConfigError, match=r"\w+\.Settings has no field nonsense; it has kind, init"):
        from_dict(ModelConfig, values)
    values["image"]["adapter"] = {"kind": "nope"}
    with pytest.raises(ConfigError, match="there is no adapter 'nope'; choose from linear, "):
        from_dict(ModelConfig, values)


def test_another_preset_by_name_keeps_what_else_was_changed():
    config = module(CONFIGS / "sft.py").get_config()
    config.model.preset, config.model.image.adapter.dropout, config.model.layout = (
        "omnifusion-tiny",
        0.3,
        "original",
    )
    expected = preset("omnifusion-tiny")
    expected.image.adapter.dropout, expected.layout = 0.3, "original"
    assert resolve(config.model) == expected
    assert resolve(expected) is expected
    config.model.preset = "nope"
    with pytest.raises(ConfigError, match="choose from omnifusion"):
        resolve(config.model)


def test_unknown_fields_are_refused():
    with pytest.raises(ConfigError, match="no field nonsense"):
        from_dict(TrainConfig, {"nonsense": 1})


BOTH = {
    "model.image.encoders": (EncoderConfig(), EncoderConfig(image_size=224)),
    "model.image.adapter": adapter("sum"),
}
REFUSED = [  # what is set in configs/pretrain.py, and what the message says
    ({"optimizer.name": "sgd"}, "optimizer.name is 'sgd'; choose from adamw, adafactor, lion, muon"),
    (
        {"optimizer.name": "adafactor", "optimizer.weight_decay": 0.1},
        "weight_decay does not work with adafactor",
    ),
    ({"optimizer.name": "adafactor", "optimizer.moments": "int8"}, "adafactor has no moments to speak of"),
    ({"optimizer.moments": "int4"}, "choose from float32, bfloat16, int8"),
    ({"optimizer.name": "lion", "optimizer.beta2": 0.9}, "lion has none"),
    ({"optimizer.learning_rate": 0.0}, "learning_rate 0.0 is not positive"),
    ({"optimizer.warmup": 1.0}, r"in \[0, 1\), not 1.0"),
    ({"optimizer.warmup": -0.1}, r"in \[0, 1\), not -0.1"),
    ({"optimizer.horizon": 0.99}, "optimizer.horizon is 0.99"),
    ({"loss_mean_rows": 3}, "batch_size 256 is not a multiple of loss_mean_rows 3"),
    ({"loss_mean_rows": -1}, "loss_mean_rows -1"),
    ({"model.image.adapter.init": "zeros"}, "normal, torch"),
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
    ({"model.image.encoders[0].activation": "relu"}, "quick_gelu"),
    ({"model.image.encoders[0].feature_layer": -26}, "outside -25..24"),
    ({"model.image.encoders[0].feature_layer": 25}, "outside -25..24"),
    ({"model.image.encoders[0].image_size": 13}, "image_size 13 is less than encoder.patch 14"),
    ({"model.image.encoders[0].shortest_edge": 335}, "shortest_edge 335 is less than encoder.image_size 336"),
    ({"model.image.encoders[0].heads": 3}, "encoder.width 1024 is not a multiple of encoder.heads 3"),
    (
        {"model.image.encoders[0].class_token": False, "model.image.encoders[0].keep_class_token": True},
        "keep_class_token needs encoder.class_token",
    ),
    (
        {"model.image.encoders[0].post_norm": False, "model.image.encoders[0].feature_norm": True},
        "feature_norm needs encoder.post_norm",
    ),
    ({"model.image.adapter": adapter("sum")}, "'sum' takes 2 of the encoders, there is 1"),
    ({"model.image.encoders": (EncoderConfig(),) * 3}, "'transformer' takes 1 of the encoders, there are 3"),
    ({"model.image.encoders": ()}, "'transformer' takes 1 of the encoders, there are 0"),
    (
        {"model.image.adapter.kind": "mlp"},
        r"adapter.kind 'mlp' has settings of its own: image.adapter is to be adapter\('mlp', ...\)",
    ),
    ({"model.image.adapter.kind": "nope"}, "there is no adapter 'nope'"),
    ({"model.image.adapter.dropout": 1.0}, r"adapter.dropout 1.0 is not in \[0, 1\)"),
    ({"model.image.adapter.heads": 3}, "the adapter's width 1024 is not a multiple of adapter.heads 3"),
    ({"model.decoder.family": "gpt"}, "there is no decoder 'gpt'; choose from .*mistral"),
    ({"model.decoder.kv_heads": 5}, "decoder.heads 32 is not a multiple of decoder.kv_heads 5"),
    ({"model.decoder.head_dim": 65}, "head_dim 65 is odd"),
    ({"model.image.unpad": True}, "need image.fit=tiles"),
    ({"model.image.newline": True}, "need image.fit=tiles"),
    (
        {
            "model.image.fit": "tiles",
            "model.image.unpad": True,
            "model.image.encoders[0].keep_class_token": True,
        },
        "follow the grid of patches",
    ),
    (
        {
            "model.image.fit": "tiles",
            "model.image.newline": True,
            "model.image.adapter": adapter("resampler"),
        },
        "rows of adapter.kind 'resampler'",
    ),
    ({"model.image.fit": "tiles", **BOTH}, "image.fit=tiles works with one encoder"),
    ({"model.image.fit": "stretch"}, "crop, pad, squash, tiles"),
    ({"model.image_place": "middle"}, "prefix, mark"),
    (
        {"model.image_place": "mark", "model.layout": "original"},
        "model.layout=original has a place of its own for pictures",
    ),
    ({"data.num_workers": -1}, "data.num_workers is -1; it must be 0 or more"),
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
    *[
        ({name: 0}, f"{name} is 0; it must be positive")
        for name in ("steps", "batch_size", "grad_accum", "log_every", "max_bad_steps")
    ],
    ({"grad_accum": 7}, "batch_size 256 is not a multiple of grad_accum"),
    ({"objective": "nonsense"}, "answers, patches"),
    ({"compute_dtype": "float16"}, "bfloat16, float32"),
    ({"remat": "some"}, "none, dots, full, offload"),
    ({"lora.rank": -1}, "lora.rank is -1"),
    ({"lora.alpha": 0.0}, "lora.alpha 0.0 is not positive"),
    ({"lora.dropout": 1.0}, "lora.dropout 1.0 is not in"),
    ({"lora.targets": "("}, "is no regular expression"),
    ({"lora.base": "int2"}, "choose from compute_dtype, int8, int4"),
    ({"grad_dtype": "float16"}, "bfloat16, float32"),
    (
        {"grad_dtype": "bfloat16", "compute_dtype": "float32"},
        "would round what compute_dtype=float32 computes",
    ),
    ({"spread_sequence": True}, "spread_sequence spreads over mesh.tensor, which is 1"),
    ({"train_parts": ()}, "train_parts is empty"),
    ({"train_parts": (("(adapter", 1.0),)}, r"train_parts: '\(adapter' is no regular expression: missing \)"),
]
ALLOWED = [  # at the edge
    {"model.image.encoders[0].feature_layer": -25},
    {"model.image.encoders[0].feature_layer": 24},
    {"model.image.encoders[0].image_size": 14},
    {"model.image.encoders[0].shortest_edge": 336},
    {"model.image.adapter.dropout": 0.0},
    {"model.image.fit": "tiles", "model.image.encoders[0].keep_class_token": True},
    {"model.image.fit": "tiles", "model.image.adapter": adapter("resampler", queries=16)},
    {"model.image_place": "mark", "model.layout": "text"},
    BOTH,
    {"optimizer.warmup": 0.0},
    {"data.max_length": 32768},
    {"data.max_length": 1},
    {"mesh.data": -1, "mesh.fsdp": 1},
    {"grad_accum": 256},
    {"checkpoint.every_steps": 0, "checkpoint.every_minutes": 0.0, "checkpoint.keep": 1},
]


@pytest.mark.parametrize(
    ("values", "message"), REFUSED, ids=lambda value: ",".join(value) if isinstance(value, dict) else ""
)
def test_settings_that_cannot_work_are_refused(values, message):
    config = changed(shipped.load("pretrain"), values)
    with pytest.raises(ConfigError, match=message):
        config.validate()


@pytest.mark.parametrize("values", ALLOWED, ids=str)
def test_settings_at_the_edge_are_allowed(values):
    assert changed(shipped.load("pretrain"), values).validate()


def joined(kind, **settings):
    """A stream with encoders of 1024 and 768 channels, as many as such an adapter takes.

    The second encoder's 256 rows are fewer.
    """
    encoders = EncoderConfig(), EncoderConfig(image_size=224, width=768, heads=12, layers=12)
    return ImageConfig(encoders[: ADAPTERS[kind].encoders], adapter(kind, **settings))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("linear", {"init": "zeros"}, "normal, torch"),
        ("mlp", {"activation": "relu"}, "adapter.activation is 'relu'; choose from gelu, gelu_tanh"),
        ("concat", {"heads": 3}, "the adapter's width 1024 is not a multiple of adapter.heads 3"),
        ("concat", {"width": 10}, "the adapter's width 10 is not a multiple of adapter.heads 4"),
        ("concat", {"dropout": 1.0}, r"adapter.dropout 1.0 is not in \[0, 1\)"),
        ("sum", {"first_state": 13}, "first_state 13 is not in 0..12"),
        ("sum", {"first_state": -1}, "first_state -1 is not in 0..24"),
        ("sum", {"bias": "some"}, "layers, one, none"),
        ("sum", {"activation": "relu"}, "adapter.activation is 'relu'"),
        ("sum", {"align": "stretch"}, "adapter.align is 'stretch'; choose from pad, interpolate"),
        ("attention", {"heads": 3}, "the adapter's width 1024 is not a multiple of adapter.heads 3"),
        ("attention", {"queries": 0}, "adapter.queries is 0; there must be one at least"),
        ("attention", {"heads": 0}, "adapter.heads is 0; there must be one at least"),
        ("attention", {"heads": -4}, "adapter.heads is -4"),
        ("attention", {"first_state": 13}, "first_state 13 is not in 0..12"),
        ("resampler", {"queries": 10}, "adapter.queries 10 make no square grid"),
        ("resampler", {"queries": 0}, "adapter.queries 0 make no square grid"),
        ("resampler", {"queries": -1}, "adapter.queries -1 make no square grid"),
        ("resampler", {"heads": 3}, "the adapter's width 4096 is not a multiple of adapter.heads 3"),
    ],
)
def test_settings_of_an_adapter_that_cannot_work_are_refused(kind, settings, message):
    joined(kind).validate(4096)
    with pytest.raises(ConfigError, match=message):
        joined(kind, **settings).validate(4096)


@pytest.mark.parametrize("kind", ["sum", "resampler"])
def test_a_class_token_has_no_place_in_a_grid(kind):
    c = joined(kind, **({"align": "interpolate"} if kind == "sum" else {}))
    c.validate(4096)
    c.encoders[-1].keep_class_token = True
    with pytest.raises(ConfigError, match=r"encoder\.keep_class_token has no place in the grid"):
        c.validate(4096)


@pytest.mark.parametrize(
    ("kind", "settings", "rows", "side"),
    [
        ("linear", {}, 576, 24),
        ("mlp", {}, 576, 24),
        ("transformer", {}, 576, 24),
        ("concat", {}, 576 + 256, None),
        ("sum", {"first_state": 12}, 576, None),
        ("attention", {"queries": 5, "width": 12}, 5, None),
        ("resampler", {}, 64, 8),
    ],
)
def test_rows_that_an_adapter_gives(kind, settings, rows, side):
    c = joined(kind, **settings)
    c.validate(4096)
    assert (c.rows, c.side) == (rows, side)


def test_parts_of_a_model():
    """As checkpoints, the freeze table and flags call them; each parameter is of one."""
    c = preset("omnifusion-1.1-mix")
    first, second = c.image.encoders
    expected = {"image/encoders/0": first, "image/encoders/1": second, "image/adapter": c.image.adapter}
    assert c.parts == expected | {"special": ("user", "bot", "soi", "eoi"), "decoder": c.decoder}
    assert list(c.parts) == ["image/encoders/0", "image/encoders/1", "image/adapter", "special", "decoder"]
    assert "special" not in preset("llava-1.5-7b").parts
    assert preset("llava-next-mistral-7b").parts["special"] == ("newline",)
    for name in ("omnifusion-1.1-mix", "llava-1.5-7b"):
        assert set(map(part_of, nnx.parameters(abstract(preset(name))))) == set(preset(name).parts)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("image/encoders/0/patch/kernel", "image/encoders/0"),
        ("image/encoders/12/layers/attention/query/kernel", "image/encoders/12"),
        ("image/adapter/mixes/0/layers/kernel", "image/adapter"),
        ("audio/encoders/0/patch/kernel", "audio/encoders/0"),
        ("special/user", "special"),
        ("decoder/layers/norm1/scale", "decoder"),
        ("decoder/embed", "decoder"),
        ("head", "head"),
    ],
)
def test_the_part_that_a_parameter_is_of(path, part):
    assert part_of(path) == part


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"min_new_tokens": 200}, "min_new_tokens 200 is not in"),
        ({"num_return_sequences": 0, "temperature": 1.0}, "num_return_sequences is 0"),
        ({"num_return_sequences": 2}, "greedy decoding gives one answer"),
        ({"num_return_sequences": 4, "num_beams": 3}, "4 is more than num_beams 3"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
        ({"min_p": 1.5}, "min_p 1.5 is not in"),
        ({"forced_eos": True, "forced_eos_token_id": 3}, "both say what the last token is"),
        ({"stop_strings": ("a", "")}, "stop_strings is empty"),
        ({"likeliest": 65}, "likeliest 65 is not in"),
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
    assert GenerationConfig(
        max_new_tokens=1,
        num_beams=1,
        temperature=0.1,
        top_p=1.0,
        top_k=0,
        no_repeat_ngram_size=0,
        seed=2**32 - 1,
    )


def test_the_published_recipe():
    """The arguments of `generate` in the published code."""
    ends = {"ban_newline": True, "forced_eos": True}
    assert GenerationConfig.official() == GenerationConfig(
        50, num_beams=3, early_stopping=True, no_repeat_ngram_size=4, banned=("\n", "</s>", ":"), **ends
    )


def test_settings_of_two_checkpoints_are_compared_field_by_field():
    ours, theirs = EncoderConfig(), EncoderConfig(width=512, mean=HALF, eps=1e-6)
    with pytest.raises(ConfigError) as caught:
        same_settings("model.image.encoders.0", ours, theirs, "there", but=("eps",))
    assert str(caught.value) == (
        "there was made with other settings than the config's model.image.encoders.0. To take them over: "
        "--config.model.image.encoders.0.width=512 '--config.model.image.encoders.0.mean=(0.5, 0.5, 0.5)'"
    )
    taken = shlex.split(str(caught.value).partition("take them over: ")[2])  # as a shell reads it
    here = flags.FlagValues()
    config = ConfigFlags(here)
    command.parsed(["train", "--config=pretrain", *taken], [], [config], here)
    same_settings(
        "model.image.encoders.0", config.value.model.image.encoders[0], theirs, "there", but=("eps",)
    )
    same_settings("model.image.encoders.1", None, None, "there")
    with pytest.raises(ConfigError, match=r"there has a model\.image\.encoders\.1, the config has none"):
        same_settings("model.image.encoders.1", None, theirs, "there")
    with pytest.raises(ConfigError, match=r"there has no model\.image\.encoders\.1, the config has one"):
        same_settings("model.image.encoders.1", ours, None, "there")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("linear", "transformer"), ("transformer", "linear"), ("sum", "attention"), ("mlp", "resampler")],
)
def test_settings_of_two_kinds_of_adapter_are_compared(ours, theirs):
    """What is to be typed makes the other kind of it, whichever has more settings."""
    ours, theirs = adapter(ours), adapter(theirs)
    for field in {"heads", "queries", "eps"} & vars(theirs).keys():
        setattr(theirs, field, 2 * getattr(theirs, field))
    with pytest.raises(ConfigError) as caught:
        same_settings("model.image.adapter", ours, theirs, "there")
    here = flags.FlagValues()
    config = ConfigFlags(here)
    command.parsed(
        ["train", "--config=pretrain", *shlex.split(str(caught.value).partition("take them over: ")[2])],
        [],
        [config],
        here,
    )
    assert config.value.model.image.adapter == theirs


def test_a_config_read_from_json_has_tuples_and_parts_that_may_be_missing():
    for c in (preset("omnifusion-1.1-mix"), preset("llava-next-mistral-7b")):
        assert from_dict(ModelConfig, json.loads(to_json(c))) == c


def test_nothing_is_said_twice_in_a_settled_encoder():
    c = EncoderConfig(image_size=336, shortest_edge=336, position_grid=24)
    assert c.canonical() == EncoderConfig(image_size=336)
    other = EncoderConfig(image_size=336, shortest_edge=384, position_grid=16)
    assert other.canonical() == other


def test_defaults_that_pages_promise():
    c = TrainConfig()
    assert (c.data.bad_share, c.data.check, c.data.on_bad_sample) == (
        0.01,
        "first_epoch",
        "raise",
    )  # README: "more than 1 %"
    assert (
        c.checkpoint.every_minutes,
        c.loss_mean_rows,
        c.optimizer.horizon,
        c.model.image.adapter.init,
    ) == (0.0, 0, 1.0, "normal")
