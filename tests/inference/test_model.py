"""What users call: generate, stream, logits."""

import dataclasses

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.errors import ConfigError, DataError
from omnifusion_jax.inference import prompts
from omnifusion_jax.inference.model import Model, forward

GREEDY = GenerationConfig(max_new_tokens=12)
SAMPLED = GenerationConfig(max_new_tokens=12, temperature=1.0, top_k=30, top_p=0.95, seed=7)
BEAMS = GenerationConfig(max_new_tokens=12, num_beams=2, no_repeat_ngram_size=3)
TEXTS = ("What is it?", "How many circles are there? There are two.", "Сколько здесь красных кругов?", "Left")


def small():
    """Few layers: it is the host code that is tested here."""
    config = tiny.config()
    config.image.encoders[0].layers, config.decoder.layers = 2, 1
    return config


def parameters(config):
    arrays = tiny.arrays(config)
    arrays["decoder/head"] *= 3
    arrays["decoder/head"][:, 2] *= 1.6  # so that some answers end by themselves
    return arrays


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = small()
    return Model(config, parameters(config), tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def ask(text, *images, **more):
    return Request([{"role": "user", "content": text}], images=list(images), **more)


@pytest.fixture(scope="module")
def mixed():
    """Questions with and without a picture."""
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    return [ask(text, *([picture] if i % 2 else [])) for i, text in enumerate(TEXTS * 2)]


def test_a_model_says_what_it_is(model):
    sizes = [a.size for a in parameters(small()).values()]
    size = f"{4 * sum(sizes) / 1e6:,.1f} MB"
    assert repr(model) == f"<Model: {sum(sizes):,} parameters, float32, {size}, on 1 x cpu>"


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED, BEAMS])
def test_an_answer_does_not_depend_on_its_batch(model, mixed, generation):
    together, alone = (model.generate(mixed, generation, batch_size=n) for n in (8, 1))
    for a, b in zip(together, alone, strict=True):
        assert (a.tokens, a.text, a.finish_reason) == (b.tokens, b.text, b.finish_reason)
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
    assert len({tuple(a.tokens) for a in together}) > 2


def test_why_answers_end(model, mixed):
    ended, eos = set(), model.tokenizer.eos
    for answer in model.generate(mixed, GREEDY):
        assert (
            answer.finish_reason == ("stop" if answer.tokens[-1] == eos else "length")
            and answer.error is None
        )
        assert 0 < len(answer.tokens) <= 12 and eos not in answer.tokens[:-1]
        assert answer.text == model.tokenizer.decode(answer.tokens) and "</s>" not in answer.text
        ended.add(answer.finish_reason)
    assert ended == {"stop", "length"}
    forced = model.generate(mixed, dataclasses.replace(GREEDY, max_new_tokens=3, forced_eos=True))
    assert all(
        a.tokens[-1] == eos and a.finish_reason == ("length" if len(a.tokens) == 3 else "stop")
        for a in forced
    )


def test_speakers_have_the_names_of_either_form(model):
    """LLaVA's human and gpt are the user and the assistant, also where the model speaks next."""
    turns = ("What is it?", "A circle.", "Which colour?")
    for count in range(1, 4):
        llava, usual = (
            Request(
                [{"role": role, "content": text} for role, text in zip(roles, turns[:count], strict=False)]
            )
            for roles in (("human", "gpt") * 2, ("user", "assistant") * 2)
        )
        one, other = model.logits([llava, usual])
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED])
def test_a_stream_is_the_answer(model, mixed, generation):
    for request in mixed[:4]:
        found = list(model.stream(request, generation))
        assert "".join(found) == model.generate([request], generation)[0].text


def test_a_stream_that_is_left_is_answered_no_further(model, mixed):
    endless = dataclasses.replace(GREEDY, max_new_tokens=40, suppress_tokens=(model.tokenizer.eos,))
    left = model.stream(mixed[1], endless)
    next(left)
    left.close()
    assert list(model.stream(mixed[2], GREEDY)) and not model.talks.scheduler.tasks


def test_seeds(model, mixed):
    def tokens(seed):
        return [a.tokens for a in model.generate(mixed, dataclasses.replace(SAMPLED, seed=seed))]

    assert tokens(1) == tokens(1) != tokens(2)
    twice = model.generate([mixed[0]] * 2, SAMPLED)
    assert twice[0].tokens != twice[1].tokens  # a question asked twice is drawn twice


def test_the_second_request_compiles_nothing(model, mixed):
    for generation in (SAMPLED, BEAMS):
        model.generate(mixed[1:4], generation)
    list(model.stream(mixed[1], SAMPLED))
    drawn = dataclasses.replace(SAMPLED, temperature=0.5, top_p=0.8, seed=3, max_new_tokens=9)
    searched = dataclasses.replace(BEAMS, early_stopping=True, length_penalty=0.7, max_new_tokens=9)
    picture = np.zeros((9, 9), np.uint8)
    with drive.compiled() as programs:
        for generation in (drawn, searched):
            model.generate([ask("Is it red?", picture), mixed[0], mixed[2], mixed[3]], generation)
        list(model.stream(ask("Where?", picture), drawn))
    assert not programs


def test_logits(model, mixed):
    answered = Request(
        [*mixed[1].messages, {"role": "assistant", "content": "Two circles."}], images=mixed[1].images
    )
    found = model.logits([*mixed, answered])
    answers = model.generate(mixed, dataclasses.replace(GREEDY, max_new_tokens=1))
    for scores, answer in zip(found, answers, strict=False):
        assert scores.dtype == np.float32 and scores.shape[1] == tiny.VOCAB
        assert [scores[-1].argmax()] == answer.tokens
        assert jax.nn.log_softmax(scores[-1]).max() == pytest.approx(answer.logprob, abs=1e-3)
    ids = model.tokenizer.encode("Two circles.")
    assert len(found[-1]) == len(found[1]) + len(ids) + 1  # the answer and its end
    np.testing.assert_allclose(found[-1][: len(found[1])], found[1], atol=1e-3)


def test_logprob_by_logits(model):
    """The answer, laid out as a turn, has the log probability that generation counted."""
    g = dataclasses.replace(
        GREEDY, banned_tokens=tuple((i,) for i in range(259))
    )  # so that the text leads back to the tokens
    answer = model.generate([ask("What is it?")], g)[0]
    sample = prompts.lay_out(ask("What is it?"), "here", model.prepare)
    n = len(sample.tokens)
    batch = prompts.assemble([sample], model.prepare)
    tokens, kind, segments, positions = (
        a.copy() for a in (batch.tokens, batch.kind, batch.segments, batch.positions)
    )
    here = np.s_[0, n : n + len(answer.tokens)]
    tokens[here], kind[here], segments[here], positions[here] = (
        answer.tokens,
        1,
        1,
        np.arange(n, n + len(answer.tokens)),
    )
    scores = forward(
        model.module, batch._replace(tokens=tokens, kind=kind, segments=segments, positions=positions)
    )
    scores = jax.nn.log_softmax(scores)
    chosen = scores[0, np.arange(n - 1, n - 1 + len(answer.tokens)), np.array(answer.tokens)]
    assert chosen.sum() == pytest.approx(answer.logprob, abs=1e-3)


def test_an_answer_may_fill_the_room_to_the_last_position(model):
    """As many tokens as the model has positions, question and answer together; one more is refused."""
    question = ask("What is it?")
    length = len(prompts.lay_out(question, "here", model.prepare, ask=True).tokens)
    room = model.config.decoder.max_length - length
    answer = model.generate([question], dataclasses.replace(GREEDY, max_new_tokens=room))[0]
    assert answer.error is None and answer.tokens
    with pytest.raises(
        DataError, match=f"request 0: {length} tokens and max_new_tokens {room + 1} exceed the model's 256"
    ):
        model.generate([question], dataclasses.replace(GREEDY, max_new_tokens=room + 1))


def test_a_request_alone_is_a_list_of_one(model, mixed):
    for once, listed in (
        (model.generate(mixed[1], GREEDY), model.generate([mixed[1]], GREEDY)),
        (model.logits(mixed[1]), model.logits([mixed[1]])),
    ):
        assert len(once) == len(listed) == 1
    assert model.generate(mixed[1], SAMPLED)[0].tokens == model.generate(iter([mixed[1]]), SAMPLED)[0].tokens


BAD = {
    "no file": (ask("What?", "nowhere.jpg"), "nowhere.jpg"),
    "a mark too many": (ask("<image><image> What?", np.zeros((9, 9, 3), np.uint8)), "2 <image> marks"),
    "not a picture": (ask("What?", 17), "type int"),
    "empty": (ask(""), "empty"),
    "no turn": (Request([]), "messages"),
    "not text": (Request([{"role": "user", "content": None}]), "content"),
    "answered": (
        Request([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        "last turn",
    ),
    "too long": (ask("circle " * 200), "max"),
    "no room": (ask("circles are there " * 25), "max_new_tokens"),
    "a string": ("What?", "str"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request(model, mixed, name):
    bad, says = BAD[name]
    requests = [mixed[0], mixed[1], mixed[2], bad]
    g = dataclasses.replace(GREEDY, max_new_tokens=120 if name == "no room" else 12)
    with pytest.raises(DataError, match="request 3") as raised:
        model.generate(requests, g)
    assert says in str(raised.value)
    if name != "no room":
        answers = model.generate(requests, g, on_error="record")
        assert (
            answers[3].finish_reason == "error"
            and answers[3].error == str(raised.value)
            and answers[3].tokens == []
        )
        assert [a.tokens for a in answers[:3]] == [a.tokens for a in model.generate(mixed[:3], g)]


def test_a_request_is_named_by_its_id(model):
    with pytest.raises(DataError, match=r'request 0 \(id "cat"\)'):
        model.generate([ask("What?", "nowhere.jpg", id="cat")])
    with pytest.raises(DataError, match="nowhere"):
        model.logits([ask("What?", "nowhere.jpg")])
    with pytest.raises(DataError, match="nowhere"):
        model.stream(ask("What?", "nowhere.jpg"))


def test_each_answers_what_comes_and_pulls_no_more_than_there_is_room_for(model, mixed):
    """A request, one that is laid out already, one that cannot be used: their answers are those of a list."""
    expected, pulled = model.generate(mixed, SAMPLED), []

    def coming():
        for i, request in enumerate(mixed * 2):
            pulled.append(i)
            if i == 5:
                yield DataError("line 5: no dialogue")
            elif i == 7:
                yield dataclasses.replace(request, messages=[])
            elif i % 2:
                yield request
            else:
                yield prompts.Question(i, prompts.question(request, "here", model.prepare, 12))

    answers = model.each(coming(), SAMPLED, batch_size=4)
    found = dict([next(answers)])
    assert len(pulled) <= 8
    found |= {i: answer for i, answer in answers if i < len(mixed)}
    assert sorted(found) == list(range(8)) and len(pulled) == 16
    assert found[5].error == "line 5: no dialogue" and found[7].error.startswith("request 7")
    assert {found[i].finish_reason for i in (5, 7)} == {"error"}
    assert all(found[i].tokens == expected[i].tokens for i in (0, 1, 2, 3, 4, 6))
    with pytest.raises(ConfigError, match="0 to 319"):
        model.each([], GenerationConfig(banned_tokens=((320,),)))


def test_settings_that_cannot_be(model, mixed):
    with pytest.raises(ConfigError, match="num_beams=1"):
        model.stream(mixed[0], BEAMS)
    with pytest.raises(ConfigError, match="num_return_sequences=1, not 1 and 2"):
        model.stream(mixed[0], dataclasses.replace(SAMPLED, num_return_sequences=2))
    with pytest.raises(ConfigError, match="0 to 319"):
        model.generate(mixed, GenerationConfig(banned_tokens=((320,),)))
    with pytest.raises(ConfigError, match="on_error"):
        model.generate(mixed, on_error="ignore")
    with pytest.raises(ConfigError, match="dtype"):
        Model(model.config, {}, model.tokenizer, dtype="float16")


SEVERAL = [
    dataclasses.replace(SAMPLED, num_return_sequences=3),
    dataclasses.replace(BEAMS, num_beams=3, num_return_sequences=3, likeliest=2),
]


@pytest.mark.parametrize("generation", SEVERAL)
def test_several_answers(model, mixed, generation):
    """The first is the one that is given where one is asked for."""
    one = model.generate(mixed, dataclasses.replace(generation, num_return_sequences=1), batch_size=3)
    several = model.generate(mixed, generation, batch_size=3)
    scores = [jax.nn.log_softmax(logits[-1]) for logits in model.logits(mixed)]
    for alone, answer, first in zip(one, several, scores, strict=True):
        assert answer.tokens == alone.tokens and not alone.others
        every = [answer, *answer.others]
        assert len({tuple(a.tokens) for a in every}) == 3 and not any(a.others for a in answer.others)
        for a in every:
            assert a.text == model.tokenizer.decode(a.tokens) and len(a.logprobs) == len(a.tokens)
            assert a.logprob == pytest.approx(sum(a.logprobs)) and a.finish_reason in ("stop", "length")
            assert a.logprobs[0] == pytest.approx(float(first[a.tokens[0]]), abs=1e-3)
            assert len(a.likeliest) == (len(a.tokens) if generation.likeliest else 0)


def test_the_likeliest(model, mixed):
    """Three are asked for, four are kept; those of the first step by the logits that the model gives."""
    answers = model.generate(mixed, dataclasses.replace(GREEDY, likeliest=3))
    scores = model.logits(mixed)
    for answer, logits in zip(answers, scores, strict=True):
        assert [step[0] for step in answer.likeliest] == list(
            zip(answer.tokens, answer.logprobs, strict=True)
        )
        assert {len(step) for step in answer.likeliest} == {3}
        expected = np.argsort(-logits[-1])[:3].tolist()
        assert [token for token, _ in answer.likeliest[0]] == expected
        told = [logprob for _, logprob in answer.likeliest[0]]
        np.testing.assert_allclose(told, jax.nn.log_softmax(logits[-1])[np.array(expected)], atol=1e-3)


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED])
def test_stop_strings(model, mixed, generation):
    """Whole answers tell where those must end that stop at a string of one of them."""
    whole = model.generate(mixed, generation)
    string = next(answer.text[3:5] for answer in whole if answer.text[3:5].isascii() and len(answer.text) > 5)
    stopped = model.generate(mixed, dataclasses.replace(generation, stop_strings=(string, "never")))
    for before, answer in zip(whole, stopped, strict=True):
        assert string not in model.tokenizer.decode(answer.tokens[:-1])
        assert before.tokens[: len(answer.tokens)] == answer.tokens
        assert (string in before.text) == (string in answer.text)
        if string in answer.text:
            assert answer.finish_reason == "stop"
    assert any(len(a.tokens) < len(b.tokens) for a, b in zip(stopped, whole, strict=True))


def test_nothing_asked(model):
    assert model.generate([]) == [] and model.logits([]) == []


def test_pictures_as_people_have_them(model, tmp_path):
    array = np.random.default_rng(1).integers(0, 256, (33, 21, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    forms = [array, Image.fromarray(array), str(tmp_path / "a.png"), tmp_path / "a.png"]
    answers = model.generate([ask("What is it?", form) for form in forms], GREEDY)
    assert len({tuple(a.tokens) for a in answers}) == 1


def test_bfloat16(model):
    config = small()
    arrays = {path: jnp.asarray(a) for path, a in parameters(config).items()}
    half = Model(config, arrays, model.tokenizer, dtype="bfloat16")
    assert {a.dtype for a in jax.tree.leaves(half.module)} == {jnp.dtype("bfloat16")}
    question = ask("What is it?", np.zeros((9, 9, 3), np.uint8))
    a, b = half.logits([question])[0], model.logits([question])[0]
    assert half.generate([question], dataclasses.replace(GREEDY, max_new_tokens=1))[0].tokens == [
        a[-1].argmax()
    ]
    rounded = {path: np.asarray(a.astype("bfloat16").astype("float32")) for path, a in arrays.items()}
    c = Model(config, rounded, model.tokenizer).logits([question])[0]
    assert (
        a.dtype == np.float32 and 0.5 < rms(a - b) / rms(c - b) < 2.5
    )  # about what rounding the parameters costs alone, 0.7 % of the scores
    assert rms(a - b) < 0.02 * rms(b)


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))
