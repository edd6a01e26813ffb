"""The published two-encoder layout with an adapter under invented names: in, out, and in again."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch
import transformers
from conftest import run_command
from parity.two_encoders import LAYERS, WIDTH, Both, build
from PIL import Image

import omnifusion_jax as of
from omnifusion_jax.checkpoints import assign
from omnifusion_jax.checkpoints.export import export_original
from omnifusion_jax.checkpoints.load import Checkpoint, load_checkpoint
from omnifusion_jax.config import AdapterConfig
from omnifusion_jax.errors import CheckpointError

transformers.utils.logging.disable_progress_bar()


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

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A red circle."}]
    [ours] = of.load(tmp_path / "exported", dtype="float32").logits([of.Request(talk, [picture])])
    with torch.no_grad():
        theirs = Both(tmp_path / "source", adapter).logits(picture, [(False, "What is it?"), (True, "A red circle.")]).numpy()
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("kinds", [("siglip", "clip"), ("clip", "clip")])
def test_the_order_of_towers_is_kept(tmp_path, kinds):
    """CLIP comes first where nothing says otherwise; what is written here does say it."""
    c = tiny.config()
    siglip = dataclasses.replace(c.encoder, activation="gelu_tanh", eps=1e-6, class_token=False, patch_bias=True, pre_norm=False)
    towers = {"siglip": siglip, "clip": dataclasses.replace(c.encoder, embed=16)}
    towers["clip"].keep_class_token = mixed = kinds[0] != kinds[1]
    align = "pad" if mixed else "interpolate"  # which no class token has a place in
    c.encoder, c.encoder2, c.adapter = towers[kinds[0]], towers[kinds[1]], AdapterConfig("sum", width=16, align=align)
    c.validate()
    tiny.make_tokenizer(tmp_path / "tokenizer")
    given = Checkpoint(c, tiny.arrays(c), tmp_path / "tokenizer", "native")
    export_original(given, tmp_path / "exported", pickles=False)
    again = load_checkpoint(tmp_path / "exported")
    same(again.arrays, given.arrays)
    assert [e.class_token for e in again.config.encoders] == [kind == "clip" for kind in kinds]
    assert again.config.rows == c.rows == 9 + mixed and again.config.adapter == c.adapter


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
