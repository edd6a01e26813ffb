"""OmniLMM and MiniCPM-V under their public names: what they compute, both ways, and what is refused."""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import omnilmm_models as published
import pytest
import torch
from parity.torch_models import randomised
from PIL import Image
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import omnifusion_jax as of
from omnifusion_jax.checkpoints.convert import convert
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import destinations, to_foreign
from omnifusion_jax.checkpoints.omnilmm.export import export_omnilmm, system_of
from omnifusion_jax.checkpoints.omnilmm.folded import folded
from omnifusion_jax.checkpoints.omnilmm.systems import SYSTEMS, table
from omnifusion_jax.checkpoints.storage.lazy_array import lazy
from omnifusion_jax.checkpoints.storage.weights import open_tensors, write_safetensors
from omnifusion_jax.config import DecoderConfig
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError, DataError
from omnifusion_jax.inference.model import forward
from omnifusion_jax.inference.prompts import assemble, lay_out
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.models.presets import preset
from omnifusion_jax.nn import nnx

OMNILMM, MINICPMV = SYSTEMS["omnilmm"], SYSTEMS["minicpmv"]
rng = np.random.default_rng(0)
WIDE, SMALL = (  # pictures of large shapes: resizing them is no matter of noise
    Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize(size, Image.Resampling.NEAREST)
    for size in ((90, 45), (50, 34))
)


def slices(picture):
    """WIDE (90 x 45) is 66 x 30 and two slices of 48 x 48; SMALL (50 x 34) is 60 x 36, without slices."""
    whole = picture.resize((66, 36) if picture is WIDE else (60, 36), Image.Resampling.BICUBIC)
    if picture is SMALL:
        return [whole], (0, 0)
    large = picture.resize((96, 48), Image.Resampling.BICUBIC)
    return [whole, large.crop((0, 0, 48, 48)), large.crop((48, 0, 96, 48))], (1, 2)


# (turns of the published prompt, ours, pictures)
TALKS = [
    ([("user", "{}What is it?")], ["What is it?"], [WIDE]),
    ([("user", "{}What is it?")], ["What is it?"], [SMALL]),
    ([("user", "How many?")], ["How many?"], []),
    (
        [("user", "{}What is it?"), ("assistant", "A red circle"), ("user", "{}Where is it?")],
        ["<image>\nWhat is it?", "A red circle", "<image>\nWhere is it?"],
        [SMALL, WIDE],
    ),
]


@pytest.fixture(scope="module", params=published.SYSTEMS)
def system(request, tmp_path_factory):
    """(the model in PyTorch, its directory, ours)"""
    directory = tmp_path_factory.mktemp(request.param)
    model = published.Whole(request.param)
    published.save(model, directory)
    return model, directory, of.load(directory, dtype="float32")


def requests():
    return [
        of.Request(
            [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)], images
        )
        for _, texts, images in TALKS
    ]


def expected(model, directory, talk, learning=False):
    turns, _, pictures = talk
    seen = [
        slices(picture) if model.name == "minicpm-v-2.0" else (published.squashed(picture), None)
        for picture in pictures
    ]
    flat = [one for found, _ in seen for one in found]
    grids = [grid for _, grid in seen]
    with torch.set_grad_enabled(learning):
        return published.expected_inputs(model, directory, turns, flat, grids)


def test_logits(system):
    """Of one picture, none, and several in a dialogue; slices of all sizes in one batch."""
    model, directory, ours = system
    found = ours.logits(requests())
    for mine, talk in zip(found, TALKS, strict=True):
        with torch.no_grad():
            theirs = model.llm(inputs_embeds=expected(model, directory, talk)).logits[0].numpy()
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("beams", [1, 3])
def test_answers(system, beams):
    """Greedily, and as MiniCPM-V 1.0 answers by default: three beams, repetition penalty 1.2."""
    model, directory, ours = system
    penalty = {} if beams == 1 else {"repetition_penalty": 1.2}
    answers = ours.generate(requests(), of.GenerationConfig(max_new_tokens=12, num_beams=beams, **penalty))
    for answer, talk in zip(answers, TALKS, strict=True):
        embeds = expected(model, directory, talk)
        assert answer.tokens == published.generate(model, embeds, 12, num_beams=beams, **penalty)


@pytest.mark.parametrize("system", ["minicpm-v-2.0"], indirect=True)
def test_pictures_of_other_shapes_compile_nothing(system):
    _, _, ours = system
    ask = lambda size: ours.logits(
        of.Request([{"role": "user", "content": "Why?"}], [Image.new("RGB", size)])
    )
    ask((60, 60))
    before = forward._cache_size()
    for size in ((30, 40), (40, 30), (90, 60), (200, 200)):
        ask(size)
    assert forward._cache_size() == before


def test_written_again_every_tensor_is_equal(system, tmp_path):
    model, directory, _ = system
    convert(directory, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "again", to="omnilmm")
    theirs, ours = open_tensors(directory), open_tensors(tmp_path / "again")
    assert set(theirs) == set(ours)
    for name, a in theirs.items():
        if "pos_embed" in name and "resampler" in name:  # which the test computes in double precision
            np.testing.assert_allclose(np.asarray(ours[name]), a, atol=1e-6)
        else:
            np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(a), err_msg=name)
    settings = json.loads((tmp_path / "again/config.json").read_text())
    assert {name: settings.get(name) for name in model.settings} == model.settings
    assert load_checkpoint(tmp_path / "again").config == load_checkpoint(directory).config


def test_settings_are_those_of_the_preset(system):
    """Of a model of this kind: all but sizes and names."""
    model, _, ours = system
    named = preset({"omnilmm": "omnilmm-12b"}.get(model.name, model.name))
    sizes = (
        "preset", "filled_from", "vocab", "width", "layers", "heads", "kv_heads", "head_dim", "mlp",
        "max_length", "residual_scale", "logit_scale", "image_size", "patch", "position_grid",
        "budget", "queries",
    )  # fmt: skip
    for mine, theirs in (
        (ours.config, named),
        (ours.config.image, named.image),
        (ours.config.decoder, named.decoder),
        (ours.config.image.encoders[0], named.image.encoders[0]),
        (ours.config.image.adapter, named.image.adapter),
    ):
        plain = lambda c: {
            k: v for k, v in vars(c).items() if k not in (*sizes, "image", "decoder", "encoders", "adapter")
        }
        assert plain(mine) == plain(theirs)


def test_a_file_of_torch_and_bfloat16(tmp_path):
    """The positions in it are rounded as ours would be; a head that is not stored is tied."""
    model = published.Whole("minicpm-v-2.0", tied=True)
    published.save(model, tmp_path / "made", torch.bfloat16, binary=True)
    found = load_checkpoint(tmp_path / "made")
    assert found.config.decoder.tied and "decoder/head" not in found.arrays
    assert str(found.arrays["image/adapter/queries"].dtype) == "bfloat16"
    convert(tmp_path / "made", tmp_path / "again", to="omnilmm")
    theirs, ours = open_tensors(tmp_path / "made"), open_tensors(tmp_path / "again")
    assert set(theirs) == set(ours)
    for name, a in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(a), err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_what_config_json_leaves_to_the_tensors_and_what_it_says(tmp_path, tied):
    """Whether there is a head of its own; and how many slices a picture has at most, and of what size."""
    published.save(published.Whole("minicpm-v-2.0", tied=tied), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"max_slice_nums": 4, "image_size": 96}
    del settings["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = load_checkpoint(tmp_path)
    assert found.config.decoder.tied == tied and ("decoder/head" in found.arrays) != tied
    assert found.config.image.slices == 4
    assert found.config.image.encoders[0].image_size == published.SIZE  # scale_resolution


@pytest.mark.parametrize("system", ["minicpm-v-1.0"], indirect=True)
def test_minicpm_as_a_plain_llama(system, tmp_path):
    """What it computes needs no multipliers any more."""
    model, directory, _ = system
    convert(directory, tmp_path / "llama", to="llama")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation="eager")
    ids = torch.tensor(np.random.default_rng(1).integers(0, 320, (2, 20)))
    with torch.no_grad():
        ours, theirs = plain(ids).logits.numpy(), model.llm(ids).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("scales", [(12.0, 0.25), (3.0, 1.0), (1.0, 0.5), (2.0, 2.0)], ids=str)
def test_a_tied_head_has_a_multiplier_of_its_own(scales):
    """Embeddings take theirs and the head its own, as one array only where both are the same."""
    c = DecoderConfig(family="minicpm", tied=True, embed_scale=scales[0], logit_scale=scales[1])
    table = rng.normal(size=(5, 8)).astype(np.float32)
    plain, found = folded(c, {"decoder/embed": lazy(table)})
    embed = np.asarray(found["decoder/embed"])
    head = embed.T if plain.tied else np.asarray(found["decoder/head"])
    np.testing.assert_array_equal(embed, table * np.float32(scales[0]))
    np.testing.assert_array_equal(head, table.T * np.float32(scales[1]))
    assert plain.tied == (scales[0] == scales[1])


def test_the_public_files_at_full_size():
    """By name and shape: the 694 tensors of MiniCPM-V 2.0, and 11.6 billion values of OmniLMM-12B."""
    c = preset("minicpm-v-2.0")
    tensors = destinations(table(c, MINICPMV), shapes_of(c))
    named = {name: place.shape for name, place in tensors.items()} | {"resampler.pos_embed": (64, 2304)}
    assert len(named) == 694
    assert named["vpm.pos_embed"] == (1, 729, 1152) and named["vpm.patch_embed.proj.weight"] == (
        1152,
        3,
        14,
        14,
    )
    assert named["vpm.blocks.25.attn.qkv.weight"] == (3456, 1152) and "vpm.blocks.26.norm1.bias" not in named
    assert named["resampler.attn.in_proj_weight"] == (6912, 2304)
    assert named["resampler.kv_proj.weight"] == (2304, 1152)
    assert named["resampler.query"] == (64, 2304) and named["resampler.proj"] == (2304, 2304)
    assert named["llm.model.layers.39.mlp.down_proj.weight"] == (2304, 5760)
    assert named["llm.lm_head.weight"] == named["llm.model.embed_tokens.weight"] == (122753, 2304)
    c = preset("omnilmm-12b")
    tensors = destinations(table(c, OMNILMM), shapes_of(c))
    named = {name: place.shape for name, place in tensors.items()}
    tower = "model.vision_tower."
    assert named[tower + "cls_token"] == (1, 1, 1792) and named[tower + "pos_embed"] == (1, 257, 1792)
    assert named[tower + "blocks.62.attn.q_bias"] == named[tower + "blocks.62.attn.v_bias"] == (1792,)
    assert tower + "blocks.63.norm1.weight" not in named
    assert not any("attn.qkv.bias" in name or "k_bias" in name for name in named)
    assert named[tower + "blocks.0.mlp.fc1.weight"] == (15360, 1792)
    assert named["model.resampler.kv_proj.weight"] == (4096, 1792)
    assert named["model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)
    assert round(sum(map(math.prod, named.values())) / 1e9, 1) == 11.6


@pytest.mark.parametrize("name", ["omnilmm", "minicpm-v-2.0"])
def test_gradients(name, tmp_path):
    """Of a loss over the logits of a question, for every parameter by its public name.

    The model is less sharp than that of other tests: attention that hardly chooses makes less of rounding.
    """
    model = published.Whole(name, draw=functools.partial(randomised, spread=0.08))
    published.save(model, tmp_path)
    talk, made = TALKS[0], load_checkpoint(tmp_path)
    c, prepare = made.config, Prepare.of(Tokenizer(made.tokenizer), made.config, 1024)
    arrays = {path: jnp.asarray(a) for path, a in made.arrays.items()}
    batch = assemble([lay_out(requests()[0], "here", prepare)], prepare)
    embeds = expected(model, tmp_path, talk, learning=True)
    n = embeds.shape[1]
    assert len(batch.tokens) == 1 and (batch.kind[0] > 0).sum() == n
    weights = np.random.default_rng(4).normal(size=(n, c.decoder.vocab)).astype(np.float32)

    def loss(arrays):
        module = nnx.with_parameters(abstract(c), arrays)
        return (jax.nn.log_softmax(module(batch)[0, :n]) * weights).sum() / n

    gradients = to_foreign(jax.device_get(jax.jit(jax.grad(loss))(arrays)), table(c, system_of(c)))
    scores = model.llm(inputs_embeds=embeds).logits[0]
    (torch.log_softmax(scores, -1) * torch.tensor(weights)).sum().div(n).backward()
    theirs = {
        name: p.grad.numpy() for name, p in model.tensors(parameters=True).items() if p.grad is not None
    }
    assert theirs.keys() == {name for name in gradients}
    largest = max(np.abs(a).max() for a in theirs.values())
    for name, gradient in theirs.items():
        scale = max(np.abs(gradient).max(), 1e-3 * largest)  # that of a key's bias is zero but for rounding
        np.testing.assert_allclose(
            np.asarray(gradients[name]), gradient, rtol=0, atol=1e-5 * scale, err_msg=name
        )


def changed(directory, target, settings=None, tensors=None):
    """A copy with other settings and tensors; what is None is removed."""
    shutil.copytree(directory, target)
    now = json.loads((target / "config.json").read_text()) | (settings or {})
    (target / "config.json").write_text(json.dumps(now))
    held = dict(open_tensors(directory)) | (tensors or {})
    held = {name: np.array(a) for name, a in held.items() if a is not None}
    write_safetensors(target / "model.safetensors", held)
    return target


@pytest.mark.parametrize(
    ("settings", "tensors", "said"),
    [
        ({"mm_use_im_start_end": False}, {}, "mm_use_im_start_end is False"),
        ({"query_num": 9}, {}, r"query_num is 9, resampler\.query has 4 rows"),
        ({"vision_encoder": "vit_huge"}, {}, "vision_encoder is 'vit_huge', supported is one like"),
        ({"patch_size": 14}, {}, "patch_size is 14, supported is 6"),
        ({}, {"resampler.query": None}, r"resampler\.query is missing, which says"),
        ({}, {"resampler.pos_embed": None}, r"resampler\.pos_embed is missing"),
        ({}, {"resampler.pos_embed": np.ones((4, 128), np.float32)}, "holds other positions than"),
        ({}, {"resampler.kv_proj.weight": None}, "image/adapter/projection/kernel: missing"),
        ({}, {"vpm.blocks.0.norm1.scale": np.ones(32, np.float32)}, "the model has no such tensor"),
        ({"hidden_act": "gelu"}, {}, "hidden_act is 'gelu'"),
    ],
)
def test_what_is_refused(tmp_path, settings, tensors, said):
    model = published.Whole("minicpm-v-2.0")
    published.save(model, tmp_path / "made")
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(changed(tmp_path / "made", tmp_path / "changed", settings, tensors))


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """(OmniLMM with its tower, the same without, the tower as timm has it): OmniLMM's code saves the tower
    only if it was tuned, and runs all of timm's blocks but the last."""
    folder, prefix = tmp_path_factory.mktemp("apart"), "model.vision_tower."
    model = published.Whole("omnilmm", tower={**published.TOWER, "layers": 63})
    for name in ("whole", "timm"):
        (folder / name).mkdir()
    published.save(model, folder / "whole")
    tower = {name.removeprefix(prefix): a for name, a in model.tensors().items() if name.startswith(prefix)}
    changed(folder / "whole", folder / "rest", tensors={prefix + name: None for name in tower})
    torch.save(tower, folder / "cut.pt")
    last = {name.replace(".62.", ".63."): -a for name, a in tower.items() if "blocks.62." in name}
    tower |= last | {"head.weight": torch.zeros(1024, 32), "head.bias": torch.zeros(1024)}
    save_file(tower, folder / "timm/model.safetensors")
    for file, lost in (("short.pt", "blocks.6"), ("holed.pt", "blocks.5.")):
        torch.save({name: a for name, a in tower.items() if not name.startswith(lost)}, folder / file)
    named = {"architecture": "eva02_enormous_patch14_clip_224", "num_classes": 1024}
    (folder / "timm/config.json").write_text(json.dumps(named))
    return folder


@pytest.mark.parametrize("vision", ["timm", "timm/model.safetensors", "cut.pt"])
def test_a_tower_that_lies_elsewhere(apart, tmp_path, vision):
    """The model is that of the checkpoint which holds it, to the bit, with and without the last block."""
    made, _ = convert(apart / "rest", tmp_path / "native", vision=apart / vision)
    expected, found = load_checkpoint(apart / "whole"), load_checkpoint(tmp_path / "native")
    assert made.config == found.config == expected.config
    assert found.arrays.keys() == expected.arrays.keys()
    for path, a in expected.arrays.items():
        np.testing.assert_array_equal(np.asarray(found.arrays[path]), np.asarray(a), err_msg=path)


@pytest.mark.parametrize(
    ("source", "vision", "said"),
    [
        ("rest", {}, r"saved without its vision tower, eva02_enormous.*, and none given\. Pass one as vision "
         r"\(--vision\): .*, or timm/eva02_enormous_patch14_clip_224\.laion2b_plus"),
        ("rest", {"vision": "timm", "vision2": "timm"}, "and 2 given"),
        ("rest", {"vision": "whole"}, "whole: not the vision tower of .*rest, which is timm's eva02"),
        ("rest", {"vision": "whole/model.safetensors"}, r"model\.safetensors: not the vision tower of"),
        ("rest", {"vision": "short.pt"}, "it has 59 blocks, 63 are run"),
        ("rest", {"vision": "holed.pt"}, r"vision_tower\.blocks\.5\.norm1\.weight -> .*: missing"),
        ("whole", {"vision": "timm"}, r"holds its vision tower, model\.vision_tower\.\*; leave out"),
    ],
)  # fmt: skip
def test_a_tower_that_is_missing_is_another_or_is_there_already(apart, source, vision, said):
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(apart / source, **{option: apart / name for option, name in vision.items()})


def test_tokens_that_were_added_keep_their_ids(tmp_path):
    """Those of training among them, as added_tokens.json numbers them."""
    published.save(published.Whole("omnilmm"), tmp_path / "made")
    ids = {"<box>": 320, "<im_patch>": 321, "<im_start>": 322, "<im_end>": 323, "</box>": 324}
    (tmp_path / "made/added_tokens.json").write_text(json.dumps(dict(reversed(ids.items()))))
    found = Tokenizer(load_checkpoint(tmp_path / "made").tokenizer)
    assert {token: found.encode(token) for token in ids} == {token: [i] for token, i in ids.items()}
    ids["<im_patch>"], ids["<box>"] = 330, 321
    (tmp_path / "made/added_tokens.json").write_text(json.dumps(ids))
    with pytest.raises(CheckpointError, match=r"gives '<box>' the id 321, and the tokenizer has 320 for it"):
        load_checkpoint(tmp_path / "made")


def test_a_model_that_the_format_cannot_hold(system, tmp_path):
    _, directory, _ = system
    found = load_checkpoint(directory)
    found.config.image.encoders[0].feature_norm = False
    with pytest.raises(CheckpointError, match=r"model\.image\.encoders\.0\.feature_norm would be True"):
        export_omnilmm(found, tmp_path / "out")


def test_a_system_turn(system):
    """OmniLMM's takes the place of its own; MiniCPM has no place for one."""
    model, _, ours = system
    talk = of.Request([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
    if model.kind == "minicpmv":
        with pytest.raises(DataError, match="leaves the system's turn out"):
            ours.logits(talk)
    else:
        assert len(ours.logits(talk)[0]) < len(ours.logits(of.Request(talk.messages[1:]))[0])
