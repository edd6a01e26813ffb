"""Every preset has its parameters, counted on shapes; the page of them is what its command writes; a command
line may change a preset."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
from absl import flags

from omnifusion_jax import sharding
from omnifusion_jax.checkpoints.decoders.language_models import decoder_config
from omnifusion_jax.cli import command
from omnifusion_jax.cli.overrides import ConfigFlags
from omnifusion_jax.config import adapter, part_of
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.encoder_presets import PUBLISHED, encoder
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.models.presets import PRESETS, preset, resolve
from omnifusion_jax.nn import nnx

ROOT = Path(__file__).parents[1]


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("presets", ROOT / "examples/presets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/presets.md").read_text() == module.page() + "\n", (
        "python examples/presets.py > docs/presets.md"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built_and_spread(name):
    """Over eight devices, of which each gets little more than an eighth of the bytes.

    A vocabulary of an odd size cannot be cut in two: of such a table each gets a quarter.
    """
    c = preset(name)
    c.validate()
    arrays = nnx.parameters(abstract(c))
    placed = placements(sharding.make_mesh(fsdp=4, tensor=2), arrays)
    each = {path: math.prod(placed[path].shard_shape(a.shape)) for path, a in arrays.items()}
    whole = {path: a.size for path, a in arrays.items()}
    assert all(each[path] <= size / 4 for path, size in whole.items() if size > 2**20)
    encoders = [path for path in whole if not path.startswith("decoder/")]
    large = name != "omnifusion-tiny"  # whose norms and biases weigh more
    parts = {"encoders, adapter": (encoders, 4), "decoder": (set(whole) - set(encoders), 8)}
    uneven = [path for path in ("decoder/embed", "decoder/head") if c.decoder.vocab % 2]
    for part, (paths, devices) in parts.items():
        more = sum(whole[p] for p in paths if p in uneven) * (1 / 4 - 1 / devices)
        assert (
            sum(each[p] for p in paths)
            < (1.05 if large else 1.2) / devices * sum(whole[p] for p in paths) + more
        ), part


def configs_in(config):
    """A config and those in it."""
    yield config
    for value in vars(config).values():
        for one in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(one):
                yield from configs_in(one)


def test_presets_share_nothing_that_could_be_changed():
    for make, table in ((preset, PRESETS), (encoder, PUBLISHED)):
        for name in table:
            made = make(name)
            before = repr(make(name))
            for part in list(configs_in(made)):
                for field in vars(part):
                    setattr(part, field, "changed")
            assert repr(make(name)) == before


def test_published_sizes():
    """Sizes are those of the files on the Hugging Face Hub, and of the report's adapter.

    Its 56,682,546 parameters are the size of the published two-encoder projection.pt.
    """
    counts = {name: {} for name in ("llava-1.5-7b", "omnifusion-1.1-mix")}
    for name in counts:
        for path, a in nnx.parameters(abstract(preset(name))).items():
            counts[name][part_of(path)] = counts[name].get(part_of(path), 0) + a.size
    assert counts["omnifusion-1.1-mix"]["image/adapter"] == 56_682_546
    assert sum(counts["llava-1.5-7b"].values()) == 7_063_427_072  # llava-hf/llava-1.5-7b-hf


MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
VICUNA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}
LARGER = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
LARGER |= {"num_attention_heads": 40, "num_key_value_heads": 40}
PADDED = {"vocab_size": 32064}  # as converted for Hugging Face
LATER = {"rope_theta": 1000000.0, "sliding_window": None}
# config.json of mistralai/Mistral-7B-v0.1 and of lmsys/vicuna-*-v1.5, text_config of llava-hf's models
PUBLISHED_DECODERS = {
    "omnifusion-1.1": MISTRAL,
    "report-clip-l-vicuna-7b": VICUNA,
    "report-clip-l-vicuna-13b": VICUNA | LARGER,
    "llava-1.5-7b": VICUNA | PADDED,
    "llava-1.5-13b": VICUNA | LARGER | PADDED,
    "llava-next-mistral-7b": MISTRAL | LATER | PADDED,  # from Mistral-7B-Instruct-v0.2
}


@pytest.mark.parametrize("name", PUBLISHED_DECODERS)
def test_decoders_are_as_published(name):
    assert preset(name).decoder == decoder_config(PUBLISHED_DECODERS[name])


def test_unknown_names_list_the_known():
    with pytest.raises(ConfigError, match=r"no encoder 'clip'; choose from clip-vit-l-14-336"):
        encoder("clip")


def command_line(*flags_given, file="configs/pretrain.py"):
    """The model's config after a command line, as train.py has it."""
    here = flags.FlagValues()
    section = ConfigFlags(here)
    command.parsed(["train", f"--config={ROOT / file}", *flags_given], [], [section], here)
    return section.value.model


SUM = "--config.model.preset=report-sum-mistral-7b"


@pytest.mark.parametrize("turn", [1, -1], ids=["preset first", "preset last"])
def test_what_the_command_line_sets_wins_over_another_preset(turn):
    """Also where it is what the old preset had: the new one has kind=sum, and 2048 rather than 128 for the
    tiny one's decoder."""
    c = command_line(*[SUM, "--config.model.image.adapter.kind=transformer"][::turn])
    assert (c.preset, c.image.adapter.kind, c.image.encoders[1]) == (
        "report-sum-mistral-7b",
        "transformer",
        encoder("dinov2-l"),
    )
    c = command_line(
        *[
            "--config.model.preset=omnifusion-tiny",
            "--config.model.decoder.width=4096",
            "--config.model.layout=omnifusion",
        ][::turn]
    )
    assert (c.decoder.width, c.decoder.layers, c.image.encoders[0].width) == (4096, 4, 128)


def test_what_the_config_file_changed_is_kept_too():
    c = command_line(SUM, file="configs/pretrain.py:original")
    assert (c.layout, c.image.adapter.init, c.image.adapter.kind) == ("original", "torch", "sum")
    c = command_line(SUM, "--config.model.layout=omnifusion", file="configs/pretrain.py:original")
    assert (c.layout, c.image.adapter.init) == ("omnifusion", "torch")


@pytest.mark.parametrize("turn", [1, -1], ids=["preset first", "preset last"])
def test_fields_of_a_part_that_only_the_new_preset_has(turn):
    c = command_line(*["--config.model.image.encoders.1.image_size=336", SUM][::turn])
    assert c.image.encoders[1] == dataclasses.replace(encoder("dinov2-l"), image_size=336)


def test_fields_of_a_part_that_only_the_old_preset_has_are_refused():
    said = r"no flag --config\.model\.image\.encoders\.1\.image_size; is .*\.encoders\.0\.image_size meant\?"
    with pytest.raises(SystemExit, match=said):
        table = "configs/report/table5.py:sum"
        command_line(
            "--config.model.preset=omnifusion-1.1",
            "--config.model.image.encoders.1.image_size=448",
            file=table,
        )
    assert command_line(
        "--config.model.preset=omnifusion-1.1", file="configs/report/table5.py:sum"
    ) == preset("omnifusion-1.1")


def test_a_part_that_was_put_in_or_taken_out_stays_so():
    c = preset("omnifusion-1.1")
    c.preset, c.image.encoders = "omnifusion-tiny", (*c.image.encoders, encoder("dinov2-s"))
    assert resolve(c).image.encoders == (encoder("clip-vit-l-14-336"), encoder("dinov2-s"))
    c.preset = "report-sum-mistral-7b"  # has another one
    assert resolve(c).image.encoders[1] == encoder("dinov2-s")
    c = preset("report-sum-mistral-7b")
    c.preset, c.image.encoders = "report-attention-mistral-7b", c.image.encoders[:1]
    assert resolve(c).image.encoders == (encoder("clip-vit-l-14-336"),)


def test_each_of_several_encoders_keeps_what_was_changed():
    c = preset("report-sum-mistral-7b")
    c.preset = "report-concat-mistral-7b"
    c.image.encoders[1].feature_layer = -1
    first, second = encoder("clip-vit-l-14-336"), dataclasses.replace(encoder("dinov2-l"), feature_layer=-1)
    assert resolve(c).image.encoders == (first, second) and resolve(c).image.adapter == adapter("concat")


def test_an_adapter_of_another_kind_is_kept_whole():
    """With a new preset too; of one of the same kind what was changed."""
    c = preset("omnifusion-1.1")
    c.preset, c.image.adapter = "llava-1.5-7b", adapter("resampler", queries=16)
    assert resolve(c).image.adapter == adapter("resampler", queries=16)
    c = preset("llava-1.5-7b")
    c.preset, c.image.adapter.activation = "llava-1.5-13b", "gelu_tanh"
    assert resolve(c).image.adapter == adapter("mlp", mlp=5120, activation="gelu_tanh")


def test_nothing_of_the_tables_is_changed():
    before = repr([preset(name) for name in PRESETS])
    command_line(
        SUM, "--config.model.image.adapter.kind=transformer", "--config.model.image.encoders.0.image_size=28"
    )
    assert repr([preset(name) for name in PRESETS]) == before
