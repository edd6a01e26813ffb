"""How likely given answers are, against the scores of whole dialogues."""

import jax
import numpy as np
import pytest
import tiny

from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference import scoring
from omnifusion_jax.inference.model import Model

CANDIDATES = ["A red circle", "red", "There are two circles to the left of it.", "два", "red"]
PICTURE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
TEMPLATE = "{% for m in messages %}{% if m.role == 'user' %}Turn: {% for p in m.content %}"
TEMPLATE += "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %} Answer:{% else %}{% generation %} "
TEMPLATE += "{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endgeneration %}{% endif %}{% endfor %}"
LAYOUTS = {
    "vectors": {},
    "words": {"layout": "text"},
    "template": {"layout": "template", "template": TEMPLATE},
}


def made(directory, **settings):
    c = tiny.config(**settings)
    c.image.encoders[0].layers, c.decoder.layers = 1, 2
    arrays = tiny.arrays(c)
    arrays["decoder/head"] *= 3
    return Model(c, arrays, tiny.make_tokenizer(directory))


@pytest.fixture(scope="module", params=LAYOUTS)
def model(request, tmp_path_factory):
    return made(tmp_path_factory.mktemp("tokenizer"), **LAYOUTS[request.param])


def talk(*contents):
    roles = ("user", "assistant", "user", "assistant")
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


ASKED = ("What is it?", "A blue square.", "How many circles are there?")


def test_scores_are_those_of_the_whole_dialogue(model, monkeypatch):
    reads, read = [], scoring.read
    monkeypatch.setattr(scoring, "read", lambda *args: reads.append(args) or read(*args))
    found = model.score(Request(talk(*ASKED), [PICTURE]), CANDIDATES, batch_size=2)
    assert len(found) == len(CANDIDATES) and len(reads) == 1
    whole = model.logits([Request(talk(*ASKED, text), [PICTURE]) for text in CANDIDATES])
    for score, text, logits in zip(found, CANDIDATES, whole, strict=True):
        tokens = [*model.tokenizer.encode(text), model.tokenizer.eos]
        rows = np.asarray(jax.nn.log_softmax(logits, axis=1))[-len(tokens) - 1 : -1]
        assert score.tokens == tokens
        np.testing.assert_allclose(score.logprobs, rows[np.arange(len(tokens)), tokens], atol=2e-4)
        assert score.logprob == pytest.approx(sum(score.logprobs), abs=1e-4)
        assert score.mean == pytest.approx(score.logprob / len(tokens))
    assert found[1].logprob == pytest.approx(found[-1].logprob, abs=1e-4)


def test_what_cannot_be_scored(model):
    request = Request(talk("What is it?"), [PICTURE])
    assert model.score(request, []) == []
    for candidates, says in (
        (["red", ""], "request, candidate 1: turn 1 is empty"),
        (["red", 3], "request, candidate 1 is a int, not a string"),
        ("red", "candidates are one string, 'red'"),
        (["red " * 400], "request, candidate 0: .* exceed the model's"),
    ):
        with pytest.raises(DataError, match=says):
            model.score(request, candidates)
    with pytest.raises(DataError, match="the last turn is the assistant's"):
        model.score(Request(talk("What is it?", "red")), ["red"])


def test_damaged_weights(tmp_path):
    model = made(tmp_path)
    c, arrays = model.config, tiny.arrays(model.config)
    arrays["decoder/head"][:, 5] = np.nan
    with pytest.raises(DataError, match="not finite numbers"):
        Model(c, arrays, model.tokenizer).score(Request(talk("What is it?")), ["red"])
