"""Decoders of every family against the classes of transformers, in float32, through their own files."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
import torch
import transformers
from parity.torch_models import randomised

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import from_foreign, to_foreign
from omnifusion_jax.checkpoints.omnifusion.export import write_decoder
from omnifusion_jax.checkpoints.storage import weights
from omnifusion_jax.config import RopeScaling
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.decoder import Decoder
from omnifusion_jax.models.presets import preset
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import AttentionSpec

LENGTH = 48
C = dataclasses.replace(tiny.config().decoder, layers=2, window=None)
QWEN2 = dataclasses.replace(C, family="qwen2", qkv_bias=True)
QWEN3 = dataclasses.replace(C, family="qwen3", qk_norm=True)
# Of the eight frequencies of a head some turn more than four times in 32 positions, some less than once, some
# are between; the sequence is longer than those 32
LLAMA = dataclasses.replace(C, family="llama", rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32))
CONFIGS = {
    "qwen2": QWEN2,
    "qwen2, tied": dataclasses.replace(QWEN2, tied=True),
    "qwen3": QWEN3,
    "qwen3, tied": dataclasses.replace(QWEN3, tied=True),
    "llama, its positions stretched": LLAMA,
    "mistral, tied": dataclasses.replace(C, family="mistral", window=9, tied=True),
}


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def tokens(c):
    return np.random.default_rng(0).integers(0, c.vocab, (2, LENGTH))


def built(c, arrays):
    empty = nnx.eval_shape(lambda: Decoder(c, rngs=nnx.Rngs(0)))
    return nnx.with_parameters(
        empty, {path.removeprefix("decoder/"): jnp.asarray(a) for path, a in arrays.items()}
    )


def logits(decoder, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    spec = AttentionSpec.of(jnp.ones_like(positions), positions, decoder.config.window)
    return decoder.logits(decoder(decoder.embed_tokens(tokens), spec)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_directory_is_read_computes_the_same_and_is_written(tmp_path, name):
    c = CONFIGS[name]
    theirs = randomised(oracle.empty(c), 0)
    theirs.save_pretrained(tmp_path / "theirs")
    config, arrays = language_models.read(tmp_path / "theirs")
    assert config == c
    assert ("decoder/head" in arrays) is not c.tied
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens(c))).logits
    close(jax.jit(logits)(built(config, arrays), tokens(c)), expected)

    (tmp_path / "ours").mkdir()
    write_decoder(
        tmp_path / "ours",
        config,
        to_foreign(arrays, language_models.table(config)),
        {"bos_token_id": 1, "eos_token_id": 2},
    )
    back, report = type(theirs).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert (back.lm_head.weight is back.model.embed_tokens.weight) is c.tied
    with torch.no_grad():
        assert torch.equal(back(torch.tensor(tokens(c))).logits, expected)
    assert (language_models.HEAD in weights.open_tensors(tmp_path / "ours")) is not c.tied


def test_positions_are_stretched_only_where_they_are_said_to_be(tmp_path):
    """Else the comparison above would show nothing of it."""
    arrays = tiny.arrays(dataclasses.replace(tiny.config(), decoder=LLAMA), "decoder")
    plain, stretched = (
        jax.jit(logits)(built(c, arrays), tokens(LLAMA))
        for c in (dataclasses.replace(LLAMA, rope_scaling=None), LLAMA)
    )
    assert np.abs(plain - stretched)[:, 32:].max() > 1e-2


def test_a_head_beside_the_table_that_it_is_tied_to(tmp_path):
    """A copy, as some files have it, is left out; another one is refused."""
    c = CONFIGS["qwen2, tied"]
    theirs = randomised(oracle.empty(c), 0)
    tensors = {name: t.detach().numpy() for name, t in theirs.state_dict().items()}
    assert language_models.HEAD in tensors
    theirs.config.save_pretrained(tmp_path)
    weights.write_weights(tmp_path, tensors)
    config, arrays = language_models.read(tmp_path)
    assert config.tied and "decoder/head" not in arrays
    np.testing.assert_array_equal(np.asarray(arrays["decoder/embed"]), tensors[language_models.EMBED])

    tensors[language_models.HEAD] = tensors[language_models.HEAD] + 1
    weights.write_weights(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head.weight is not"):
        language_models.read(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(settings))  # as the message says
    config, arrays = language_models.read(tmp_path)
    assert not config.tied
    np.testing.assert_array_equal(np.asarray(arrays["decoder/head"]), tensors[language_models.HEAD].T)


def test_gradients_of_a_tied_model():
    """That of the table is the sum of both its uses."""
    c = CONFIGS["qwen3, tied"]
    theirs, ids = randomised(oracle.empty(c), 1), tokens(c)
    table = language_models.table(c)
    shapes = shapes_of(dataclasses.replace(tiny.config(), decoder=c), "decoder")
    ours = lambda tensors: {
        path: np.asarray(a) for path, a in from_foreign(tensors, table, shapes, "here").items()
    }
    named = dict(theirs.named_parameters())  # what is tied is named once
    arrays = ours({name: p.detach().numpy() for name, p in named.items()})

    def loss(arrays):
        scores = jax.nn.log_softmax(logits(built(c, arrays), ids)[:, :-1])
        return -jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(arrays)
    expected = torch.nn.functional.cross_entropy(
        theirs(torch.tensor(ids)).logits[:, :-1].flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()
    )
    expected.backward()
    close(value, expected)
    wanted = ours({name: p.grad.numpy() for name, p in named.items()})
    assert wanted.keys() == gradients.keys() and "decoder/head" not in wanted
    for path, gradient in wanted.items():
        np.testing.assert_allclose(
            gradients[path], gradient, rtol=0, atol=2e-5 * np.abs(gradient).max(), err_msg=path
        )


@pytest.mark.parametrize("tied", [False, True])
def test_minicpm(tmp_path, tied):
    """Its multipliers are Granite's: of token embeddings, of what a block adds, of scores.

    By the last Granite divides; its tensors have the same names.
    """
    scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 12}
    sizes = language_models.decoder_json(dataclasses.replace(C, family="llama"), "float32")
    sizes["tie_word_embeddings"] = tied
    theirs = {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 1.4 / math.sqrt(C.layers),
        "logits_scaling": C.width / 12,
        "attention_multiplier": C.head_dim**-0.5,
    }
    granite = transformers.GraniteConfig(
        **{**sizes, "model_type": "granite"}, **theirs, attn_implementation="eager"
    )
    model = randomised(transformers.GraniteForCausalLM(granite), 2)
    tensors = {name: t.detach().numpy() for name, t in model.state_dict().items()}
    weights.write_weights(tmp_path, tensors)  # a tied head is there too, as a copy
    settings = {**sizes, **scales, "model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config, arrays = language_models.read(tmp_path)
    assert config.tied is tied and ("decoder/head" in arrays) is not tied
    with torch.no_grad():
        expected = model(torch.tensor(tokens(config))).logits
    close(jax.jit(logits)(built(config, arrays), tokens(config)), expected)
    written = language_models.decoder_json(config, "float32")
    assert {name: written[name] for name in settings} == settings


def test_published_multipliers_survive_being_written():
    c = preset("minicpm-v-2.0").decoder
    written = language_models.decoder_json(c, "bfloat16")
    assert (written["scale_emb"], written["scale_depth"], written["dim_model_base"]) == (12, 1.4, 256)
    assert language_models.decoder_config(written) == c
    with pytest.raises(CheckpointError, match="of the family llama has no embed_scale"):
        language_models.decoder_json(dataclasses.replace(c, family="llama"), "bfloat16")
