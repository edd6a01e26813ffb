"""Beams that keep to a form, against those of Hugging Face with a list of the tokens that may come next."""

import itertools

import numpy as np
import oracle
import pytest
import tiny
import torch

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.inference import prompts
from omnifusion_jax.inference.model import Model

CHOICES = ("red", "red circle", "two", "blue", "There are two", "picture", "q", " 7")
ASKED = [Request([{"role": "user", "content": text}]) for text in ("What is it?", "Left", "Right there?")]
FILL = tiny.VOCAB  # in theirs, after the end of an answer


@pytest.fixture(scope="module")
def model(tokenizer):
    c = tiny.shallow()
    arrays = tiny.arrays(c)
    arrays["decoder/head"] *= 3
    return Model(c, arrays, tokenizer), arrays


def texts(tokenizer):
    """The bytes of each token."""
    names = [tokenizer.backend.id_to_token(token) for token in range(tiny.VOCAB)]
    return [
        bytes([tiny.BYTES.index(name)]) if name in tiny.BYTES else name.replace(tiny.SPACE, " ").encode()
        for name in names
    ]


def next_of(tokenizer, choices):
    """What Hugging Face calls `prefix_allowed_tokens_fn`."""
    known = dict(enumerate(texts(tokenizer)))
    for special in tiny.RESERVED:
        del known[tokenizer.backend.token_to_id(special)]
    whole = [b" " + text.encode() for text in choices] + [t.encode() for t in choices if t[0] != " "]

    def allowed(_, ids):
        ids = ids.tolist()
        # A beam that is not allowed is lost already: anything may follow.
        so_far = b"".join(known.get(token, b"\xff") for token in ids)
        longer = [t for t, text in known.items() if any(one.startswith(so_far + text) for one in whole)]
        return longer + [tokenizer.eos] * (so_far in whole) or [0]

    return allowed


SETTINGS = (
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0},
    {"num_beams": 2, "num_return_sequences": 2, "early_stopping": True, "length_penalty": 2.0},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.5},
)


def test_beams_that_keep_to_choices(model):
    """All of them at once, in rows that are side by side."""
    ours, arrays = model
    theirs = oracle.language_of(ours.config.decoder, arrays)
    settings = [{"num_return_sequences": 1, "max_new_tokens": 16, **one} for one in SETTINGS]
    asked = list(itertools.product(ASKED, settings))
    engine = ours.engine(slots=16, length=64, largest=GenerationConfig(max_new_tokens=16, num_beams=4))
    handles = [engine.submit(request, GenerationConfig(choices=CHOICES, **one)) for request, one in asked]
    different = set()
    for (request, one), handle in zip(asked, handles, strict=True):
        sample = prompts.lay_out(request, "here", ours.prepare, ask=True)
        x = np.asarray(ours.module.embed(ours._assemble([sample])))[:1, : len(sample.tokens)]
        out = theirs.generate(
            inputs_embeds=torch.tensor(x),
            attention_mask=torch.ones(x.shape[:2], dtype=torch.long),
            do_sample=False,
            eos_token_id=ours.tokenizer.eos,
            pad_token_id=FILL,
            prefix_allowed_tokens_fn=next_of(ours.tokenizer, CHOICES),
            **one,
        )
        expected = [[token for token in row if token != FILL] for row in out.tolist()]
        answers = [handle.result(), *handle.result().others]
        assert [a.tokens for a in answers] == [tokens for tokens in expected if tokens]
        assert all(a.text in CHOICES for a in answers if a.finish_reason == "stop")
        different |= {tuple(a.tokens) for a in answers}
    assert len(different) > 6
