"""In bfloat16 we are no further from float32 than transformers in bfloat16 is, on average over random
models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from parity import torch_models
from parity.test_forward import SAMPLES, C, ours

from omnifusion_jax.batch import collate
from omnifusion_jax.data.layout import Layout
from omnifusion_jax.models.omnifusion import OmniFusion, abstract
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import AttentionSpec

SEEDS, LENGTH = range(8), 2 * C.decoder.window
EMPTY = abstract(C)


@jax.jit
def see(model, images):
    return VisionTransformer.hidden_states(model.image.encoders[0], images)


@jax.jit
def read(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    spec = AttentionSpec.of(jnp.ones_like(tokens), positions, C.decoder.window)
    return model.decoder(model.decoder.embed[...][tokens], spec)[0]


WHOLE = jax.jit(OmniFusion.__call__)


def theirs(original, image, tokens):
    """(hidden states of the vision tower, of the decoder after its last norm, logits of a dialogue) as
    float64."""
    kind = original.llm.dtype
    with torch.no_grad():
        states = original.clip(
            torch_models.pixels(C.image.encoders[0], image).to(kind), output_hidden_states=True
        ).hidden_states
        text = original.llm.model(torch.tensor(tokens)).last_hidden_state
        logits = original.logits(image, SAMPLES[0][1])
    return [a.double().numpy() for a in (torch.stack(states)[1:], text, logits)]


def mine(arrays, image, tokens, batch):
    model = nnx.with_parameters(EMPTY, {path: jnp.asarray(a, jnp.bfloat16) for path, a in arrays.items()})
    found = see(model, image)[1:], read(model, tokens), WHOLE(model, batch)[0]
    assert [a.dtype for a in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    return [np.asarray(a, np.float64) for a in found]


class Model(torch_models.Original):
    """The original with pixels in the type of its weights, as transformers hands them on."""

    def features(self, images):
        with torch.no_grad():
            pixels = torch_models.pixels(self.config.image.encoders[0], images).to(self.llm.dtype)
            return self.adapter(self.clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])[0]

    def modules(self):
        return self.clip, self.adapter, self.llm


def in_half(tokenizer, exact):
    """A model in bfloat16. Its table of rotary frequencies stays float32, as in a model that transformers
    loads in bfloat16."""
    made = Model(C, tokenizer)
    for module, other in zip(made.modules(), exact.modules(), strict=True):
        module.bfloat16()
        for buffer, kept in zip(module.buffers(), other.buffers(), strict=True):
            buffer.data = kept.data
    return made


def draw(exact, half, seed):
    """Other parameters for both: numbers that bfloat16 can hold, so that what is compared is arithmetic, not
    the rounding of weights."""
    for i, (module, other) in enumerate(zip(exact.modules(), half.modules(), strict=True)):
        other.load_state_dict(torch_models.randomised(module, 10 * seed + i).state_dict())
        module.load_state_dict(other.state_dict())
    half.special = {name: t.detach().bfloat16() for name, t in exact.special.items()}
    exact.special = {name: t.float() for name, t in half.special.items()}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """[seeds, (ours, theirs), (encoder, decoder, whole)]: root mean square distance from transformers in
    float32, relative."""
    tokenizer = tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    layout, image = Layout(tokenizer, C, 256), tiny.image(C)
    roles = {False: "human", True: "gpt"}
    dialogue = tiny.dialogue(tuple((roles[a], text) for a, text in SAMPLES[0][1]), image)
    sample = layout(dialogue, [tiny.picture(image[0], C.image.encoders[0].patch)])
    batch = collate(
        [sample], len(sample.tokens), tiny.tiles(C.image.encoders[0].image_size, rows=C.image.rows)
    )
    exact = Model(C, tokenizer)
    half, rows = in_half(tokenizer, exact), []
    for seed in SEEDS:
        draw(exact, half, seed)
        tokens = np.random.default_rng(seed).integers(3, C.decoder.vocab, (2, LENGTH))
        expected = theirs(exact, image, tokens)
        found = mine(ours(exact.tensors()), image, tokens, batch), theirs(half, image, tokens)
        rows.append(
            [
                [np.sqrt(((a - b) ** 2).mean() / (b**2).mean()) for a, b in zip(f, expected, strict=True)]
                for f in found
            ]
        )
    return np.array(rows)


@pytest.mark.parametrize("what", ["encoder", "decoder", "whole"])
def test_the_error_is_no_larger_than_that_of_transformers(errors, what):
    we, they = errors.mean(axis=0)[:, ["encoder", "decoder", "whole"].index(what)]
    assert 1e-4 < we <= 1.2 * they, f"{we:.2e}, transformers {they:.2e}"
