"""Requests with several pictures, against embeddings put together by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.engine import programs
from omnifusion_jax.inference.model import Model
from omnifusion_jax.nn.attend import AttentionSpec

GREEDY = GenerationConfig(max_new_tokens=6)
TEMPLATE = "{% for m in messages %}Turn: {% for p in m.content %}"
TEMPLATE += "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endfor %} Answer:"
LAYOUTS = {
    "prefix": {},
    "mark": {"image_place": "mark"},
    "text": {"layout": "text"},
    "text, mark": {"layout": "text", "image_place": "mark"},
    "template": {"layout": "template", "template": TEMPLATE},
}


def made(tokenizer, **settings):
    c = tiny.config(**settings)
    c.image.encoders[0].layers, c.decoder.layers, c.decoder.window = 2, 1, None
    arrays = tiny.arrays(c)
    arrays["decoder/head"] *= 3
    return Model(c, arrays, tokenizer)


def pictures(n):
    return list(np.random.default_rng(0).integers(0, 256, (n, 30, 40, 3), np.uint8))


def ask(text, *images):
    return Request([{"role": "user", "content": text}], list(images))


def by_hand(model, style, first, second):
    """Embeddings of a question about two pictures, "Is <image> like <image>?"."""
    processor, module = model.prepare.processors["image"], model.module
    pixels = [jnp.asarray(processor(picture).views[0])[None] for picture in (first, second)]
    rows = [np.asarray(module.image((view,)))[0] for view in pixels]
    encode = model.tokenizer.encode
    text = lambda words: np.asarray(module.decoder.embed_tokens(np.array(encode(words), np.int32)))
    vector = lambda name: np.asarray(getattr(module.special, name)[...])[None]
    if style == "template":
        ids = np.array(encode("Turn: Is <image> like <image>? Answer:"))
        here, words = (
            np.flatnonzero(np.isin(ids, list(model.prepare.layout.template.ids))),
            lambda some: np.asarray(module.decoder.embed_tokens(some)),
        )
        assert len(here) == 2
        between = ids[: here[0]], ids[here[0] + 1 : here[1]], ids[here[1] + 1 :]
        return np.concatenate([words(between[0]), rows[0], words(between[1]), rows[1], words(between[2])])
    one, two = ([vector("soi"), found, vector("eoi")] for found in rows)
    prompt = text(model.config.prompt)
    return np.concatenate(
        {
            "prefix": lambda: [prompt, *one, *two, vector("user"), text("Is  like ?"), vector("bot")],
            "mark": lambda: [
                prompt,
                vector("user"),
                text("Is "),
                *one,
                text(" like "),
                *two,
                text("?"),
                vector("bot"),
            ],
            "text": lambda: [prompt, *one, *two, text("User:Is  like ?AI:")],
            "text, mark": lambda: [prompt, text("User:Is "), *one, text(" like "), *two, text("?AI:")],
        }[style]()
    )


@jax.jit
def scores(decoder, x):
    n = jnp.arange(x.shape[0])[None]
    hidden, _ = decoder(x[None], AttentionSpec.of(jnp.ones_like(n), n, decoder.config.window))
    return decoder.logits(hidden)[0]


@pytest.mark.parametrize("style", LAYOUTS)
def test_each_picture_is_fed_where_it_stands(tokenizer, style):
    """Logits of the whole sequence, and the tokens of an answer; swapped pictures give others."""
    model, (first, second) = made(tokenizer, **LAYOUTS[style]), pictures(2)
    seen = []
    for pair in ((first, second), (second, first)):
        x, request = by_hand(model, style, *pair), ask("Is <image> like <image>?", *pair)
        found = model.logits([request])[0]
        np.testing.assert_allclose(found, scores(model.module.decoder, x), atol=2e-4)
        seen.append(found)
    assert np.abs(seen[0][-1] - seen[1][-1]).max() > 1e-2
    if style == "mark":
        [answer] = model.generate([request], GREEDY)
        whole = np.concatenate([x, np.asarray(model.module.decoder.embed_tokens(np.array(answer.tokens)))])
        chosen = np.asarray(scores(model.module.decoder, whole))[len(x) - 1 : -1].argmax(-1)
        assert chosen.tolist() == answer.tokens


def test_requests_of_no_picture_to_two_share_a_batch(tokenizer):
    model, shown = made(tokenizer), pictures(2)
    asked = [ask("What is it?", *shown[:n]) for n in (2, 0, 1)]
    together = model.generate(asked, GREEDY, batch_size=8)
    assert [a.tokens for a in together] == [model.generate(request, GREEDY)[0].tokens for request in asked]
    assert len({tuple(a.tokens) for a in together}) > 1


def test_questions_without_pictures_run_no_encoder(tokenizer, monkeypatch):
    """And a picture that several ask about is encoded once."""
    model, encoded = made(tokenizer), []
    encode = programs.encode
    monkeypatch.setattr(programs, "encode", lambda *given: encoded.append(len(given[3])) or encode(*given))
    for answer in model.generate([ask("What?"), ask("Is it red?")], GREEDY):
        assert np.isfinite(answer.logprob) and answer.tokens
    assert encoded == []
    model.generate([ask("What?", *pictures(1)), ask("Is it red?"), ask("Why?", *pictures(1))], GREEDY)
    assert encoded == [1]


def test_original_takes_one(tokenizer):
    model = made(tokenizer, layout="original")
    with pytest.raises(DataError, match="request 1: 2 pictures, but layout 'original' has place for one"):
        model.generate([ask("What?", *pictures(1)), ask("What?", *pictures(2))], GREEDY)
    assert model.generate(ask("What?", *pictures(1)), GREEDY)[0].tokens
