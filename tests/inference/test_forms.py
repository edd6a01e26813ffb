"""Answers of a given form, against what else reads such texts: sets, re and jsonschema."""

import dataclasses
import json
import re

import jsonschema
import pytest
import tiny
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.inference.forms import guides
from omnifusion_jax.inference.model import Model

ASKED = [Request([{"role": "user", "content": text}]) for text in ("What is it?", "Left", "Right there?")]
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 3, "maximum": 40},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}
CHOICES = ("red", "red circle", "\u0434\u0432\u0430", " two")
REGEX = r"[0-9]{2,3}( (a|b/c))?|x\.y"


def by_schema(text):
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


FORMS = {
    "choices": (CHOICES, CHOICES.__contains__),
    "regex": (REGEX, lambda text: re.fullmatch(REGEX, text) is not None),
    "json_schema": (json.dumps(SCHEMA), by_schema),
}


@pytest.fixture(scope="module")
def model(tokenizer):
    return Model(tiny.shallow(), tiny.arrays(tiny.shallow()), tokenizer)


@pytest.mark.parametrize("form", FORMS)
def test_answers_have_their_form(model, form):
    """A model that knows nothing is drawn from, several times for each request, and beside greedy answers."""
    value, holds = FORMS[form]
    drawn = GenerationConfig(max_new_tokens=96, temperature=1.5, num_return_sequences=4, **{form: value})
    with model.engine(slots=16, length=192, largest=drawn) as engine:
        free = engine.submit(ASKED[0], GenerationConfig(max_new_tokens=12))
        handles = [engine.submit(request, drawn, number=i) for i, request in enumerate(ASKED)]
        greedy = engine.submit(ASKED[1], dataclasses.replace(drawn, temperature=0.0, num_return_sequences=1))
        answers = [a for handle in handles for a in (handle.result(), *handle.result().others)]
        answers.append(greedy.result())
        assert free.result().tokens == model.generate(ASKED[0], GenerationConfig(max_new_tokens=12))[0].tokens
    assert len(answers) == 13 and {a.error for a in answers} == {None}
    finished = [a for a in answers if a.finish_reason == "stop"]
    assert len({a.text for a in finished}) > 2 and len(finished) > 8
    assert all(holds(a.text) for a in finished)


@pytest.mark.parametrize("form, value", [("regex", " red|blue"), ("choices", (" red", "blue"))])
def test_an_answer_may_end_where_what_is_decoded_has_the_form(tokenizer, form, value):
    """Of spaces that a text begins with decoding drops one."""
    ends = {}
    for text in ("red", " red", "  red", "blue", "  blue"):
        [guide] = guides(GenerationConfig(**{form: value}), tokenizer, tokenizer.vocab, 1)
        tokens = tokenizer.encode(text)
        for token in tokens:
            guide = guide.after(token)
        ends[tokenizer.decode(tokens)] = bool(guide.mask()[0] >> tokenizer.eos & 1)
    assert ends == {"red": False, " red": True, "blue": True, " blue": False}


def test_forms_that_cannot_be(model):
    for settings, says in (
        ({"json_schema": '{"type": "string", "minLength": 5, "maxLength": 2}'}, "json_schema.*nsatisfiable"),
        ({"regex": "["}, "regex.*invalid"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"choices": ("a", "")}, "choices is empty"),
        ({"choices": ("a",), "regex": "a"}, "one of choices, regex"),
        ({"json_schema": '{"type": "nonsense"}'}, "json_schema cannot be followed"),
        ({"regex": "a", "stop_strings": ("a",)}, "so does stop_strings"),
    ):
        with pytest.raises(ConfigError, match=says):
            model.generate(ASKED, GenerationConfig(**settings))


def test_a_form_that_cannot_be_met_is_an_answer_and_others_are_answered(model):
    bad = GenerationConfig(max_new_tokens=8, json_schema='{"type": "string", "minLength": 5, "maxLength": 2}')
    good = dataclasses.replace(bad, json_schema="", choices=("7", "8"))
    engine = model.engine(slots=4, length=192)
    for g in (good, bad, good):
        answer = engine.submit(ASKED[0], g).result()
        assert answer.finish_reason == "error" if g is bad else answer.text in good.choices
    for answer in model.generate(ASKED, bad, on_error="record"):
        assert answer.finish_reason == "error" and "json_schema cannot be followed" in answer.error
    with pytest.raises(ConfigError, match="cannot be followed"):
        model.stream(ASKED[0], bad)


def test_a_vocabulary_of_bytes_puts_no_space_before_a_text(tmp_path):
    """Its decoder keeps the space that a text begins with, which that of Llama drops."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        tiny.CORPUS,
        trainers.BpeTrainer(vocab_size=tiny.VOCAB, special_tokens=tiny.RESERVED, initial_alphabet=letters),
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    c, tokenizer = tiny.shallow(), Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(" two")) == " two" and tokenizer.vocab == tiny.VOCAB
    model = Model(c, tiny.arrays(c), tokenizer)
    engine, drawn = model.engine(slots=8, length=192), {"temperature": 1.5, "num_return_sequences": 8}
    for form, (value, holds) in FORMS.items():
        answer = engine.submit(
            ASKED[0], GenerationConfig(max_new_tokens=96, **drawn, **{form: value})
        ).result()
        finished = [a.text for a in (answer, *answer.others) if a.finish_reason == "stop"]
        assert finished and all(map(holds, finished))
        assert form == "choices" or not any(text.startswith(" ") for text in finished)


def test_a_form_that_bans_leave_nothing_of(model):
    g = GenerationConfig(max_new_tokens=8, choices=("7",), banned_tokens=((58,),))
    answer = model.generate(ASKED[0], g, on_error="record")[0]
    assert answer.finish_reason == "error" and "no token may follow" in answer.error
