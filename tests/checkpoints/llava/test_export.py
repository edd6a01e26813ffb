"""Models written as transformers' LLaVA: the same tokens there, the same arrays back, and what is refused."""

import dataclasses
import json
import re

import llava_models as lm
import numpy as np
import pytest
import tiny
import transformers as hf
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

import omnifusion_jax as of
from omnifusion_jax.checkpoints.checkpoint import Checkpoint
from omnifusion_jax.checkpoints.llava.export import export_llava, write_tokenizer
from omnifusion_jax.checkpoints.llava.written_template import check_template
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.omnifusion.export import export_original
from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.config import EncoderConfig, GenerationConfig, ImageConfig, ModelConfig, adapter
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.inference.model import Model

TOKENIZER = locate("omnifusion-tiny-decoder")
REAL = lm.PICTURES.parents[1] / "omnifusion_1_1"
DECODER = dataclasses.replace(lm.C.decoder, vocab=852, max_length=1024)
SPACES = "This  is\ta {{ dialog }} \"with\" 'AI' \\ assistant.\n"


ADAPTERS = {"linear": adapter("linear"), "mlp": adapter("mlp", mlp=48)}


def checkpoint(kind="mlp", tokenizer=TOKENIZER, dtype=np.float32, image=None, **settings):
    """`image`: fields of the ImageConfig besides encoder and adapter."""
    settings = {"decoder": DECODER, "prompt": tiny.PROMPT} | settings
    c = ModelConfig(
        preset="test", image=ImageConfig(lm.C.image.encoders, ADAPTERS[kind], **(image or {})), **settings
    )
    c.validate()
    arrays = tiny.arrays(c, seed=3)
    head = arrays["decoder/embed"].T if c.decoder.tied else arrays["decoder/head"]
    head *= 4
    head[:, 2] *= 2
    return Checkpoint(c, {path: a.astype(dtype) for path, a in arrays.items()}, tokenizer, "native")


def ours(found):
    return Model(found.config, found.arrays, Tokenizer(found.tokenizer))


def theirs(directory):
    """Model and processor, once every tensor has found its place."""
    model, report = hf.AutoModelForImageTextToText.from_pretrained(
        directory, attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model, hf.AutoProcessor.from_pretrained(directory)


# --- the same tokens


TILES = {"fit": "tiles", "unpad": True, "newline": True}


@pytest.mark.parametrize(
    ("layout", "kind", "image", "prompt"),
    [
        ("omnifusion", "linear", {}, tiny.PROMPT),
        ("omnifusion", "mlp", {"fit": "squash"}, SPACES),
        ("original", "mlp", {"fit": "pad"}, ""),
        ("text", "linear", {}, tiny.PROMPT),
        ("text", "mlp", {}, ""),
        ("omnifusion", "mlp", TILES, tiny.PROMPT),
    ],
)
def test_tokens_are_those_of_transformers(tmp_path, layout, kind, image, prompt):
    found = checkpoint(kind, layout=layout, image=image, prompt=prompt)
    export_llava(found, tmp_path / "exported")
    lm.agree(ours(found), *theirs(tmp_path / "exported"))


def test_the_published_recipe(tmp_path):
    """All of the recipe is used but the ban on repeated n-grams.

    transformers applies the ban to the prompt too where that is given as tokens.
    """
    found = checkpoint("linear")
    export_llava(found, tmp_path / "exported")
    model, processor = theirs(tmp_path / "exported")
    tokenizer, recipe = (
        Tokenizer(TOKENIZER),
        dataclasses.replace(GenerationConfig.official(), no_repeat_ngram_size=0),
    )
    bad = [ids for ids in map(tokenizer.encode, recipe.banned) if ids != [tokenizer.eos]] + [
        tokenizer.encode("\n")[-1:]
    ]
    settings = {
        "num_beams": 3,
        "early_stopping": True,
        "max_new_tokens": 50,
        "bad_words_ids": bad,
        "forced_eos_token_id": tokenizer.eos,
    }
    expected = lm.generate(model, processor, lm.requests(), remove_invalid_values=True, **settings)
    assert [a.tokens for a in ours(found).generate(lm.requests(), recipe)] == expected
    assert len({len(tokens) for tokens in expected}) > 1


def test_the_mean_of_a_bfloat16_head_is_taken_in_more_digits(tmp_path):
    """852 bfloat16 numbers near 1 add up to 256 and no further: each next one is less than half a step."""
    found = checkpoint(dtype="bfloat16")
    head = found.arrays["decoder/head"]
    head[:] = (np.asarray(head, np.float32) / 100 + 1).astype(head.dtype)
    export_llava(found, tmp_path / "exported")
    rows = open_tensors(tmp_path / "exported")["language_model.lm_head.weight"].astype(np.float64)
    np.testing.assert_allclose(rows[852:], np.repeat(rows[:852].mean(0)[None], 5, axis=0), rtol=2**-8)


def test_new_tokens_cannot_win(tmp_path):
    """Their logits are the mean of all others, whatever the hidden state.

    generation_config.json bans them besides.
    """
    export_llava(checkpoint(), tmp_path / "exported")
    head = open_tensors(tmp_path / "exported")["language_model.lm_head.weight"]
    assert head.shape == (852 + 5, 48)
    logits = head.astype(np.float64) @ np.random.default_rng(0).normal(size=(48, 1000)) * 3
    old, new = logits[:852], logits[852:]
    assert np.allclose(new, old.mean(0), atol=1e-5) and (new < old.max(0)).all()
    share = np.exp(new).sum(0) / np.exp(logits).sum(0)
    assert share.max() <= 5 / 857
    assert json.loads((tmp_path / "exported/generation_config.json").read_text())["suppress_tokens"] == [
        852,
        853,
        854,
        855,
        856,
    ]


def test_names_are_those_of_public_files(tmp_path):
    export_llava(checkpoint(image=TILES), tmp_path / "exported")
    names = open_tensors(tmp_path / "exported").keys()
    prefixes = (
        "vision_tower.vision_model. multi_modal_projector.linear_ language_model.model. "
        "language_model.lm_head.weight image_newline"
    )
    assert {prefix for prefix in prefixes.split() if any(name.startswith(prefix) for name in names)} == set(
        prefixes.split()
    )
    assert all(name.startswith(tuple(prefixes.split())) for name in names)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the released tokenizer is not in {REAL}")
@pytest.mark.parametrize("layout", ["omnifusion", "original", "text"])
def test_the_released_tokenizer_cuts_prompts_the_same(tmp_path, layout):
    c = ModelConfig(layout=layout)
    added, image = write_tokenizer(REAL, tmp_path, c)
    check_template(c, REAL, tmp_path)
    assert image == max(added.values()) == 32000 + len(added) - 1
    read = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert read("What?<image>\n").input_ids == [
        *Tokenizer(REAL).encode("What?"),
        image,
        *Tokenizer(REAL).encode("\n"),
    ]


# --- there and back


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("joins", ["mlp", "linear"])
def test_import_export_import_is_the_same_to_the_bit(tmp_path, kind, joins):
    image = TILES if kind == "llava_next" else {"fit": "pad"}
    export_llava(checkpoint(joins, image=image, dtype="bfloat16"), tmp_path / "first")
    first = load_checkpoint(tmp_path / "first")
    export_llava(first, tmp_path / "second")
    second = load_checkpoint(tmp_path / "second")
    assert second.config == first.config and second.config.preset == kind
    for path, a in first.arrays.items():
        assert second.arrays[path].dtype == a.dtype == "bfloat16"
        np.testing.assert_array_equal(second.arrays[path], a, err_msg=path)
    for file in (tmp_path / "first").iterdir():
        if file.name != "generation_config.json":  # what must not be produced is not part of a model
            assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_model_of_transformers_comes_back(tmp_path):
    model, processor = lm.build(tmp_path / "theirs", "llava_next", "llama")
    found = load_checkpoint(tmp_path / "theirs")
    export_llava(found, tmp_path / "exported")
    again = load_checkpoint(tmp_path / "exported")
    assert again.config == found.config
    assert all(np.array_equal(again.arrays[path], a) for path, a in found.arrays.items())
    asked = lm.requests()[1:6]
    assert lm.generate(*theirs(tmp_path / "exported"), asked) == lm.generate(model, processor, asked)


def same_tokens(ours, model, processor):
    """Greedily. What is tied often repeats itself until it is cut off, so that lengths tell little."""
    expected = lm.generate(model, processor, lm.requests())
    assert [a.tokens for a in ours.generate(lm.requests(), GenerationConfig(max_new_tokens=24))] == expected
    assert len({tuple(tokens) for tokens in expected}) > 2


def test_a_tied_head_stays_tied(tmp_path):
    model, processor = lm.build(tmp_path / "theirs", decoder="qwen2", tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    found = load_checkpoint(tmp_path / "theirs")
    assert found.config.decoder == lm.DECODERS["qwen2"] and "decoder/head" not in found.arrays
    same_tokens(of.load(tmp_path / "theirs"), model, processor)
    export_llava(found, tmp_path / "exported")
    assert not any("lm_head" in name for name in open_tensors(tmp_path / "exported"))
    assert load_checkpoint(tmp_path / "exported").config == found.config
    again, processor = theirs(tmp_path / "exported")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert lm.generate(again, processor, lm.requests()) == lm.generate(model, processor, lm.requests())


def test_a_tied_head_with_new_tokens_is_one_of_its_own(tmp_path):
    """A trained vector is looked up, but never produced."""
    found = checkpoint(decoder=dataclasses.replace(lm.DECODERS["qwen2"], vocab=852))
    export_llava(found, tmp_path / "exported")
    tensors = open_tensors(tmp_path / "exported")
    embed, head = (tensors[f"language_model.{name}.weight"] for name in ("model.embed_tokens", "lm_head"))
    np.testing.assert_array_equal(head[:852], embed[:852])
    assert head.shape == embed.shape == (857, 48) and not np.array_equal(head[852:], embed[852:])
    assert not load_checkpoint(tmp_path / "exported").config.decoder.tied
    same_tokens(ours(found), *theirs(tmp_path / "exported"))


def test_what_is_read_back_answers_as_before(tmp_path):
    found = checkpoint("linear")
    export_llava(found, tmp_path / "exported")
    answers = zip(
        of.load(tmp_path / "exported").generate(lm.requests()),
        ours(found).generate(lm.requests()),
        strict=True,
    )
    for again, before in answers:
        assert again.tokens == before.tokens
        assert again.logprob == pytest.approx(
            before.logprob, abs=len(before.tokens) * np.log(857 / 852)
        )  # what the new tokens take at most


def test_another_type(tmp_path):
    export_llava(checkpoint(), tmp_path / "exported", "bfloat16")
    assert {str(a.dtype) for a in open_tensors(tmp_path / "exported").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "exported/config.json").read_text())["torch_dtype"] == "bfloat16"


# --- refusals


CLIP = lm.C.image.encoders[0]
OTHER = EncoderConfig(
    image_size=24, patch=8, width=32, layers=3, heads=4, mlp=64, norm="rms", layer_scale=True
)
REFUSALS = {
    "adapter.kind 'transformer' has no place between tower and projector": {
        "adapter": adapter("transformer", heads=2)
    },
    "adapter.mlp is 64, the class has the decoder's width 48": {"adapter": adapter("mlp", mlp=64)},
    "there are two encoders, the class has one; adapter.kind 'sum' has no place": {
        "encoders": (CLIP, CLIP),
        "adapter": adapter("sum"),
    },
    "adapter.kind 'concat' has no place": {"encoders": (CLIP, CLIP), "adapter": adapter("concat", heads=2)},
    "adapter.kind 'attention' has no place": {
        "encoders": (CLIP, CLIP),
        "adapter": adapter("attention", heads=2),
    },
    "encoder.feature_norm: its features are hidden states as they are": {
        "encoders": (dataclasses.replace(CLIP, feature_norm=True),)
    },
    (
        "as CLIPVisionModel, encoder.norm would be layer, layer_scale would be False; "
        "as SiglipVisionModel, encoder.norm would"
    ): {"encoders": (OTHER,)},
    "encoder.position_grid 2: its positions are those of the picture's grid": {
        "encoders": (dataclasses.replace(CLIP, position_grid=2),)
    },
    "encoder.shortest_edge with image.fit=squash": {
        "encoders": (dataclasses.replace(CLIP, shortest_edge=32),),
        "fit": "squash",
    },
    "image.fit=tiles is exact with image.unpad and image.newline only": {"fit": "tiles"},
    "exact with image.unpad": {"fit": "tiles", "newline": True},
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_the_classes_compute_otherwise(tmp_path, reason):
    c = checkpoint().config
    c.image = dataclasses.replace(c.image, **REFUSALS[reason])
    c.validate()
    with pytest.raises(CheckpointError, match=r"^no export to transformers' LLaVA: .*" + re.escape(reason)):
        export_llava(Checkpoint(c, tiny.arrays(c), TOKENIZER, "native"), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_pictures_at_their_marks_have_no_place_in_the_written_template(tmp_path):
    c = dataclasses.replace(checkpoint().config, image_place="mark")
    with pytest.raises(CheckpointError, match="image_place=mark: the chat template of layout omnifusion has"):
        export_llava(Checkpoint(c, tiny.arrays(c), TOKENIZER, "native"), tmp_path / "exported")


def test_a_tokenizer_that_treats_pieces_otherwise(tmp_path):
    tiny.make_tokenizer(tmp_path / "first")
    file = tmp_path / "first/tokenizer.json"
    backend = Backend.from_file(str(file))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    backend.save(str(file))
    found = checkpoint(tokenizer=tmp_path / "first", decoder=dataclasses.replace(DECODER, vocab=tiny.VOCAB))
    with pytest.raises(
        CheckpointError,
        match="layout 'omnifusion' encodes each text alone, and this tokenizer does not cut a whole prompt",
    ):
        export_llava(found, tmp_path / "exported")
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="always", split=False)
    backend.add_special_tokens(["<SOI>"])
    backend.save(str(file))
    with pytest.raises(
        CheckpointError, match="the tokenizer has <SOI> already, which are to stand for trained vectors"
    ):
        export_llava(
            dataclasses.replace(found, config=dataclasses.replace(found.config, decoder=DECODER)),
            tmp_path / "exported",
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["first"]


def test_part_of_a_model_is_not_exported(tmp_path):
    whole = checkpoint()
    part = dataclasses.replace(
        whole, arrays={path: a for path, a in whole.arrays.items() if path.startswith("image/adapter/")}
    )
    with pytest.raises(
        CheckpointError,
        match="holds only image/adapter; image/encoders/0, special, decoder of the model are missing",
    ):
        export_llava(part, tmp_path / "exported")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        export_llava(dataclasses.replace(whole, tokenizer=None), tmp_path / "exported")
    with pytest.raises(
        CheckpointError, match=r"not the kind mlp with user, bot, soi, eoi\. Write --to=native, or --to=llava"
    ):
        export_original(whole, tmp_path / "original", pickles=False)


def test_trained_vectors_are_not_rounded(tmp_path):
    mixed = checkpoint()
    mixed.arrays["special/soi"] = mixed.arrays["special/soi"].astype(np.float64)
    with pytest.raises(
        CheckpointError,
        match=r"trained vectors are float64, the embeddings they join float32; give one type \(--dtype\)",
    ):
        export_llava(mixed, tmp_path / "exported")


def test_a_padded_vocabulary_stays(tmp_path):
    """Rows that no token had so far take the new ones; none is added."""
    found = checkpoint(decoder=dataclasses.replace(DECODER, vocab=896))
    found.arrays["decoder/head"][:, 852:] = 0  # training keeps them from being produced
    export_llava(found, tmp_path / "exported")
    tensors = open_tensors(tmp_path / "exported")
    assert (
        tensors["language_model.model.embed_tokens.weight"].shape
        == tensors["language_model.lm_head.weight"].shape
        == (896, 48)
    )
    np.testing.assert_array_equal(tensors["language_model.lm_head.weight"], found.arrays["decoder/head"].T)
    np.testing.assert_array_equal(
        tensors["language_model.model.embed_tokens.weight"][852], found.arrays["special/user"]
    )
    lm.agree(ours(found), *theirs(tmp_path / "exported"), beams=(1,))
