"""Every preset has its parameters, counted on shapes, and the page of them is what its command writes."""

import importlib.util
import math
from pathlib import Path

import pytest

from omnifusion_jax import sharding
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.encoders import ENCODERS, encoder
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.models.presets import PRESETS, preset
from omnifusion_jax.nn import nnx

ROOT = Path(__file__).parents[1]


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("presets", ROOT / "examples/presets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/presets.md").read_text() == module.page() + "\n", "python examples/presets.py > docs/presets.md"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built_and_spread(name):
    """Over eight devices, of which each gets little more than an eighth of the bytes."""
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
    for part, (paths, devices) in parts.items():
        assert sum(each[p] for p in paths) < (1.05 if large else 1.2) / devices * sum(whole[p] for p in paths), part


def test_presets_share_nothing_that_could_be_changed():
    for make, table in ((preset, PRESETS), (encoder, ENCODERS)):
        for name in table:
            made = make(name)
            before = repr(make(name))
            for part in [made, *(value for value in vars(made).values() if hasattr(value, "__dataclass_fields__"))]:
                for field in vars(part):
                    setattr(part, field, "changed")
            assert repr(make(name)) == before


def test_published_sizes():
    """Of the files on the Hugging Face Hub, and of the report's adapter (56,682,546: the size of the published two-encoder projection.pt)."""
    counts = {name: {} for name in ("llava-1.5-7b", "omnifusion-1.1-mix")}
    for name in counts:
        for path, a in nnx.parameters(abstract(preset(name))).items():
            part = path.split("/")[0]
            counts[name][part] = counts[name].get(part, 0) + a.size
    assert counts["omnifusion-1.1-mix"]["adapter"] == 56_682_546
    assert sum(counts["llava-1.5-7b"].values()) == 7_063_427_072  # llava-hf/llava-1.5-7b-hf


def test_unknown_names_list_the_known():
    with pytest.raises(ConfigError, match=r"no encoder 'clip'; choose from clip-vit-l-14-336"):
        encoder("clip")
