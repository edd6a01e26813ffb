"""The published two-encoder layout with an adapter under invented names: in, out, and in again."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import tiny
import torch
import transformers
from conftest import run_command
from parity.torch_models import language, randomised
from PIL import Image

import omnifusion_jax as of
from omnifusion_jax.checkpoints import assign
from omnifusion_jax.checkpoints.export import export_original
from omnifusion_jax.checkpoints.load import Checkpoint, load_checkpoint
from omnifusion_jax.config import AdapterConfig
from omnifusion_jax.errors import CheckpointError

WIDTH, LAYERS = 32, 2
transformers.utils.logging.disable_progress_bar()


class VisualToGPTMapping(torch.nn.Module):
    """What the unpublished class may have looked like: attributes, no module lists."""

    def __init__(self, names, out):
        super().__init__()
        for name in names:
            for n in range(LAYERS + 1):
                setattr(self, f"{name}_proj_{n}", torch.nn.Linear(WIDTH, WIDTH))
            setattr(self, f"{name}_norm", torch.nn.LayerNorm(WIDTH))
            setattr(self, f"{name}_coef", torch.nn.Parameter(torch.ones(LAYERS + 1)))
        self.out = torch.nn.Linear(WIDTH, out)


VisualToGPTMapping.__module__, VisualToGPTMapping.__qualname__ = "models", "VisualToGPTMapping"


def build(directory, monkeypatch, names):
    """Everything but the tokenizer's training is made by PyTorch and transformers."""
    c = tiny.config().decoder
    tiny.make_tokenizer(directory / "tokenizer")
    language(c).to(torch.bfloat16).save_pretrained(directory / "tuned-model")
    block = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    clip = transformers.CLIPVisionConfig(**block, intermediate_size=48, image_size=24, patch_size=8)
    dino = transformers.Dinov2Config(**block, mlp_ratio=2, image_size=40, patch_size=8)
    for name, model in (("z-clip", transformers.CLIPVisionModel(clip)), ("a-dino", transformers.Dinov2Model(dino))):
        randomised(model, 5).to(torch.bfloat16).save_pretrained(directory / name)
    crop = {"do_resize": True, "size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}, "resample": 3}
    processor = {**crop, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (directory / "a-dino/preprocessor_config.json").write_text(json.dumps(processor))
    module = types.ModuleType("models")
    module.VisualToGPTMapping = VisualToGPTMapping
    monkeypatch.setitem(sys.modules, "models", module)
    adapter = randomised(VisualToGPTMapping(names, c.embed), 7).to(torch.bfloat16)
    torch.save(adapter, directory / "projection.pt")
    torch.save(
        {name: torch.full((c.embed,), n, dtype=torch.bfloat16) for n, name in enumerate(("USER", "BOT", "SOI", "EOI"))},
        directory / "special_embeddings.pt",
    )
    return adapter


def same(some, others):
    assert some.keys() == others.keys()
    for path in some:
        np.testing.assert_array_equal(np.asarray(some[path]), np.asarray(others[path]), err_msg=path)


def test_in_out_and_in_again(tmp_path, monkeypatch):
    adapter = build(tmp_path / "source", monkeypatch, ("clip", "dino"))
    found = load_checkpoint(tmp_path / "source")
    c = found.config
    assert [e.embed for e in c.encoders] == [WIDTH] * 2 and c.views == ((24, 24, None), (16, 20, None)) and c.rows == 9
    assert (c.adapter.kind, c.adapter.bias, c.adapter.shared_norm, c.adapter.first_state) == ("sum", "layers", True, 0)
    assert (c.encoder.class_token, c.encoder.layer_scale, c.encoder2.layer_scale, c.encoder2.position_grid) == (True, False, True, 5)
    kernel = np.asarray(found.arrays["adapter/mixes/1/layers/kernel"]).astype(np.float32)
    np.testing.assert_array_equal(kernel[2], adapter.dino_proj_2.weight.detach().float().numpy().T)

    export_original(found, tmp_path / "exported", pickles=False)
    again = load_checkpoint(tmp_path / "exported")
    same(again.arrays, found.arrays)
    assert again.config == c

    picture = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    model = of.load(tmp_path / "exported", dtype="float32")
    [answer] = model.generate([of.Request([{"role": "user", "content": "What is it?"}], [picture])], of.GenerationConfig(max_new_tokens=3))
    assert len(answer.tokens) == 3 or answer.finish_reason == "stop"


@pytest.mark.parametrize("kinds", [("siglip", "clip"), ("clip", "clip")])
def test_the_order_of_towers_is_kept(tmp_path, kinds):
    """CLIP comes first where nothing says otherwise; what is written here does say it."""
    c = tiny.config()
    siglip = dataclasses.replace(c.encoder, activation="gelu_tanh", eps=1e-6, class_token=False, patch_bias=True, pre_norm=False)
    towers = {"siglip": siglip, "clip": dataclasses.replace(c.encoder, embed=16)}
    towers["clip"].keep_class_token = True
    c.encoder, c.encoder2, c.adapter = towers[kinds[0]], towers[kinds[1]], AdapterConfig("sum", width=16)
    c.validate()
    tiny.make_tokenizer(tmp_path / "tokenizer")
    given = Checkpoint(c, tiny.arrays(c), tmp_path / "tokenizer", "native")
    export_original(given, tmp_path / "exported", pickles=False)
    again = load_checkpoint(tmp_path / "exported")
    same(again.arrays, given.arrays)
    assert [e.class_token for e in again.config.encoders] == [kind == "clip" for kind in kinds]
    assert again.config.rows == c.rows == 10


def test_the_users_choice_between_readings(tmp_path, monkeypatch):
    build(tmp_path / "source", monkeypatch, ("v", "w"))
    with pytest.raises(assign.Ambiguous) as caught:
        load_checkpoint(tmp_path / "source")
    chosen = tmp_path / "chosen.json"
    chosen.write_text(json.dumps(caught.value.readings[-1]))
    found = load_checkpoint(tmp_path / "source", assign=chosen)
    names = assign.names(caught.value.readings[-1]["adapter/mixes/0/layers/kernel"])
    assert names == [f"{names[0][0]}_proj_{n}.weight" for n in range(LAYERS + 1)]
    assert found.config.adapter.kind == "sum"
    chosen.write_text("{}")
    with pytest.raises(CheckpointError, match=r"v_proj_0\.weight: not used"):
        load_checkpoint(tmp_path / "source", assign=chosen)


def test_a_picture_ranks_the_readings(tmp_path, monkeypatch):
    """Kernels of one encoder are a thousand times too large for the states of the other, and so is what a wrong reading makes of a picture."""
    adapter = build(tmp_path / "source", monkeypatch, ("v", "w"))
    with torch.no_grad():
        for n in range(LAYERS + 1):
            adapter.v_norm.weight.mul_(1e3 if n == 0 else 1)
            getattr(adapter, f"v_proj_{n}").weight.mul_(1e-3)
            getattr(adapter, f"v_proj_{n}").bias.mul_(0)
        adapter.v_norm.bias.mul_(0)
    torch.save(adapter, tmp_path / "source/projection.pt")
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(picture)
    told = run_command("convert", f"--source={tmp_path}/source", f"--output={tmp_path}/native", f"--check_with={picture}", fails=True)
    assert told.count("log ratio of norms") == 8 and "8 readings fit" in told and not (tmp_path / "native").exists()
    nearest = json.loads((tmp_path / "native.assign.json").read_text())
    assert nearest["adapter/mixes/0/norm/scale"][0] == nearest["adapter/mixes/0/layers/kernel"]["from"][0]  # v with v, w with w
    run_command("convert", f"--source={tmp_path}/source", f"--output={tmp_path}/native", f"--assign={tmp_path}/native.assign.json")
    assert load_checkpoint(tmp_path / "native").config.adapter.kind == "sum"


def test_one_vision_tower_is_not_enough(tmp_path, monkeypatch):
    build(tmp_path / "source", monkeypatch, ("clip", "dino"))
    with pytest.raises(CheckpointError, match=r"adapter of two encoders, 1 given\. Pass vision .*vision2 \(--vision2\)"):
        load_checkpoint(tmp_path / "source", vision=str(tmp_path / "source/z-clip"))
    swapped = load_checkpoint(tmp_path / "source", vision=str(tmp_path / "source/a-dino"), vision2=str(tmp_path / "source/z-clip"))
    assert swapped.config.encoder.layer_scale and not swapped.config.encoder2.layer_scale
