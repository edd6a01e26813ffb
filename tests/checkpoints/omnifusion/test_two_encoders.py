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
from omnifusion_jax.checkpoints.checkpoint import Checkpoint
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.omnifusion import two_encoders
from omnifusion_jax.checkpoints.omnifusion.export import export_original
from omnifusion_jax.config import adapter
from omnifusion_jax.errors import CheckpointError

transformers.utils.logging.disable_progress_bar()


def same(some, others):
    assert some.keys() == others.keys()
    for path in some:
        np.testing.assert_array_equal(np.asarray(some[path]), np.asarray(others[path]), err_msg=path)


def test_in_out_and_in_again(tmp_path, monkeypatch):
    joins = build(tmp_path / "source", monkeypatch, ("clip", "dino"))
    found = load_checkpoint(tmp_path / "source")
    c, (first, second) = found.config, found.config.image.encoders
    assert (
        [e.width for e in c.image.encoders] == [WIDTH] * 2
        and c.image.views == ((24, 24, None, None), (16, 20, None, None))
        and c.image.rows == 9
    )
    assert (
        c.image.adapter.kind,
        c.image.adapter.bias,
        c.image.adapter.shared_norm,
        c.image.adapter.first_state,
    ) == ("sum", "layers", True, 0)
    assert (first.class_token, first.layer_scale, second.layer_scale, second.position_grid) == (
        True,
        False,
        True,
        5,
    )
    kernel = np.asarray(found.arrays["image/adapter/mixes/1/layers/kernel"]).astype(np.float32)
    np.testing.assert_array_equal(kernel[2], joins.dino_proj_2.weight.detach().float().numpy().T)

    export_original(found, tmp_path / "exported", pickles=False)
    again = load_checkpoint(tmp_path / "exported")
    same(again.arrays, found.arrays)
    assert again.config == c

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A red circle."}]
    [ours] = of.load(tmp_path / "exported", dtype="float32").logits([of.Request(talk, [picture])])
    with torch.no_grad():
        theirs = (
            Both(tmp_path / "source", joins)
            .logits(picture, [(False, "What is it?"), (True, "A red circle.")])
            .numpy()
        )
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("kinds", [("siglip", "clip"), ("clip", "clip")])
def test_the_order_of_towers_is_kept(tmp_path, kinds):
    """CLIP comes first where nothing says otherwise; what is written here does say it."""
    c = tiny.config()
    [first] = c.image.encoders
    siglip = dataclasses.replace(
        first, activation="gelu_tanh", eps=1e-6, class_token=False, patch_bias=True, pre_norm=False
    )
    towers = {"siglip": siglip, "clip": dataclasses.replace(first, width=16)}
    towers["clip"].keep_class_token = mixed = kinds[0] != kinds[1]
    align = "pad" if mixed else "interpolate"  # which no class token has a place in
    c.image.encoders = tuple(dataclasses.replace(towers[kind]) for kind in kinds)
    c.image.adapter = adapter("sum", width=16, align=align)
    c.validate()
    tiny.make_tokenizer(tmp_path / "tokenizer")
    given = Checkpoint(c, tiny.arrays(c), tmp_path / "tokenizer", "native")
    export_original(given, tmp_path / "exported", pickles=False)
    again = load_checkpoint(tmp_path / "exported")
    same(again.arrays, given.arrays)
    assert [e.class_token for e in again.config.image.encoders] == [kind == "clip" for kind in kinds]
    assert (
        again.config.image.rows == c.image.rows == 9 + mixed and again.config.image.adapter == c.image.adapter
    )


def test_the_users_choice_between_readings(tmp_path, monkeypatch):
    build(tmp_path / "source", monkeypatch, ("v", "w"))
    with pytest.raises(two_encoders.Ambiguous) as caught:
        load_checkpoint(tmp_path / "source")
    chosen = tmp_path / "chosen.json"
    chosen.write_text(json.dumps(caught.value.readings[-1]))
    found = load_checkpoint(tmp_path / "source", assign=chosen)
    names = two_encoders.names(caught.value.readings[-1]["image/adapter/mixes/0/layers/kernel"])
    assert names == [f"{names[0][0]}_proj_{n}.weight" for n in range(LAYERS + 1)]
    assert found.config.image.adapter.kind == "sum"
    chosen.write_text("{}")
    with pytest.raises(CheckpointError, match=r"v_proj_0\.weight: not used"):
        load_checkpoint(tmp_path / "source", assign=chosen)


def test_a_picture_ranks_the_readings(tmp_path, monkeypatch):
    """Kernels of one encoder are a thousand times too large for the states of the other.

    So is what a wrong reading makes of a picture.
    """
    joins = build(tmp_path / "source", monkeypatch, ("v", "w"))
    with torch.no_grad():
        for n in range(LAYERS + 1):
            joins.v_norm.weight.mul_(1e3 if n == 0 else 1)
            getattr(joins, f"v_proj_{n}").weight.mul_(1e-3)
            getattr(joins, f"v_proj_{n}").bias.mul_(0)
        joins.v_norm.bias.mul_(0)
    torch.save(joins, tmp_path / "source/projection.pt")
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(picture)
    told = run_command(
        "convert",
        f"--source={tmp_path}/source",
        f"--output={tmp_path}/native",
        f"--check_with={picture}",
        fails=True,
    )
    assert (
        told.count("log ratio of norms") == 8
        and "8 readings fit" in told
        and not (tmp_path / "native").exists()
    )
    nearest = json.loads((tmp_path / "native.assign.json").read_text())
    assert (
        nearest["image/adapter/mixes/0/norm/scale"][0]
        == nearest["image/adapter/mixes/0/layers/kernel"]["from"][0]
    )  # v with v, w with w
    run_command(
        "convert",
        f"--source={tmp_path}/source",
        f"--output={tmp_path}/native",
        f"--assign={tmp_path}/native.assign.json",
    )
    assert load_checkpoint(tmp_path / "native").config.image.adapter.kind == "sum"


def test_one_vision_tower_is_not_enough(tmp_path, monkeypatch):
    build(tmp_path / "source", monkeypatch, ("clip", "dino"))
    with pytest.raises(
        CheckpointError, match=r"adapter of two encoders, 1 given\. Pass vision .*vision2 \(--vision2\)"
    ):
        load_checkpoint(tmp_path / "source", vision=str(tmp_path / "source/z-clip"))
    swapped = load_checkpoint(
        tmp_path / "source", vision=str(tmp_path / "source/a-dino"), vision2=str(tmp_path / "source/z-clip")
    )
    assert swapped.config.image.encoders[0].layer_scale and not swapped.config.image.encoders[1].layer_scale
