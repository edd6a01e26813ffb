"""Requests that share the rows of an engine: each gets the answer that it has alone."""

import asyncio
import dataclasses
import random
import threading

import drive
import jax
import numpy as np
import pytest
import tiny

from omnifusion_jax.batch import TEXT, Sample
from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.inference import prompts
from omnifusion_jax.inference.engine import programs
from omnifusion_jax.inference.engine.features import names
from omnifusion_jax.inference.engine.programs import Rows
from omnifusion_jax.inference.model import Model

GREEDY = GenerationConfig(max_new_tokens=12)
KINDS = (
    GREEDY,
    GenerationConfig(max_new_tokens=5, temperature=1.0, seed=3),
    GenerationConfig(max_new_tokens=9, num_beams=2, no_repeat_ngram_size=3),
    GenerationConfig(max_new_tokens=20, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2),
    GenerationConfig(max_new_tokens=7, num_beams=3, length_penalty=0.5, early_stopping=True),
    GenerationConfig(max_new_tokens=3, banned_tokens=((5, 6), (7,)), forced_eos=True),
)
LARGEST = dataclasses.replace(KINDS[4], max_new_tokens=32)
TEXTS = ("What is it?", "How many circles are there? There are two.", "Сколько здесь красных кругов?", "Left")


def ask(text, *images, **more):
    return Request([{"role": "user", "content": text}], list(images), **more)


def made(tokenizer, c, damage=lambda arrays: None):
    arrays = tiny.arrays(c)
    arrays["decoder/head"] *= 3
    arrays["decoder/head"][:, 2] *= 1.6  # so that some answers end by themselves
    damage(arrays)
    return Model(c, arrays, tokenizer)


def small(window=None):
    c = tiny.shallow()
    c.decoder.window = window
    return c


@pytest.fixture(scope="module")
def model(tokenizer):
    return made(tokenizer, small())


@pytest.fixture(scope="module")
def warm(model):
    """An engine in which nothing is compiled any more."""
    return model.engine(slots=(1, 4), length=192, largest=LARGEST, chunks=(64, 128)).warmup()


def drawn(seed, count):
    """Random requests with and without pictures, each with its GenerationConfig."""
    rng, dice = random.Random(seed), np.random.default_rng(seed)
    pictures = dice.integers(0, 256, (3, 30, 40, 3), np.uint8)
    found = []
    for i in range(count):
        text = " ".join(rng.choices(TEXTS, k=rng.randint(1, 3)))
        shown = rng.sample(list(pictures), rng.choice((0, 1, 1, 2)))
        found.append((ask(text, *shown, id=str(i)), rng.choice(KINDS)))
    return found


def alone(model, request, generation):
    """The answer of an engine that nobody else is in."""
    return model.generate(request, generation)[0]


def agree(found, expected):
    assert (found.tokens, found.text, found.finish_reason) == (
        expected.tokens,
        expected.text,
        expected.finish_reason,
    )
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-3)


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.sweep)])
def test_whatever_arrives_nothing_is_compiled_and_each_gets_its_own_answer(model, warm, count):
    """Requests of all kinds arrive while others are being answered; now and then one gives up."""
    asked, rng, handles, left = drawn(count, count), random.Random(count), {}, set()
    with drive.compiled() as compiled:
        for i, (request, generation) in enumerate(asked):
            handles[i] = warm.submit(request, generation)
            for _ in range(rng.randint(0, 3)):
                warm.turn()
            if i % 10 == 7:
                handles[i].cancel()
                left.add(i)
            if i % 10 == 3 and generation.num_beams == 1:
                next(iter(handles[i]))  # somebody listens
        warm.run()
    assert not compiled
    for i, handle in handles.items():
        request, generation = asked[i]
        if length(model, request) + generation.max_new_tokens > 192:
            assert "exceed" in handle.result().error
        elif i not in left or handle.result().error is None:
            agree(handle.result(), alone(model, request, generation))
        else:
            assert "cancelled" in handle.result().error
    assert len({tuple(handle.result().tokens) for handle in handles.values()}) > count // 3


def read(monkeypatch):
    """A list that grows by the numbers of columns that each call of `extend` reads."""
    seen, extend = [], programs.extend

    def watched(module, kept, state, chunk, fresh):
        seen.append(chunk.count[chunk.active].tolist())
        return extend(module, kept, state, chunk, fresh)

    monkeypatch.setattr(programs, "extend", watched)
    return seen


def length(model, request):
    """Positions of the prompt of a request."""
    return len(prompts.lay_out(request, "here", model.prepare, ask=True).tokens)


def test_questions_about_one_picture_read_it_once(model, monkeypatch):
    """All of them together read little more than the first alone, and the answers are the same."""
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    asked = [ask(text, picture) for text in TEXTS]
    expected = [alone(model, request, GREEDY) for request in asked]
    seen = read(monkeypatch)
    for found, answer in zip(model.generate(asked, GREEDY), expected, strict=True):
        agree(found, answer)
    lengths = [length(model, request) for request in asked]
    assert sum(map(sum, seen)) < max(lengths) + sum(len(text) for text in TEXTS) < sum(lengths) - len(TEXTS)


def test_a_dialogue_reads_only_its_new_turn(model, monkeypatch):
    picture = np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)
    model.talks = None
    seen, first = read(monkeypatch), ask("What is it?", picture)
    said = "".join(model.stream(first, GREEDY))
    turns = [*first.messages, {"role": "assistant", "content": said}, {"role": "user", "content": "Where?"}]
    second = Request(turns, [picture])
    before = len(seen)
    found = "".join(model.stream(second, GREEDY))
    assert sum(map(sum, seen[before:])) <= length(model, second) - length(model, first)
    assert found == alone(model, second, GREEDY).text


def put(engine, sample, generation):
    return engine.put(prompts.Question(0, sample), generation, "here").result()


def followed(sample, tokens):
    """The Sample of a prompt with more text."""
    none = np.zeros(len(tokens), np.int32)
    added = np.int32(tokens), none + TEXT, none, np.float32(none)
    return Sample(*map(np.append, sample[:4], added), *sample[4:])


def test_the_last_token_of_an_answer_is_read_with_what_follows_it(model, warm):
    """A row holds an answer but for its last token, which nothing has been computed from."""
    warm.scheduler.reset()
    question = prompts.question(ask("What is it?"), "here", model.prepare, GREEDY.max_new_tokens)
    more = put(warm, question, GREEDY).tokens + model.tokenizer.encode("Where?")
    found = put(warm, followed(question, more), GREEDY)
    warm.scheduler.reset()
    agree(found, put(warm, followed(question, more), GREEDY))


def test_an_answer_that_filled_its_row_goes_on_in_a_longer_one(model):
    """It lacks the last column too: there idle rows write, while others are answered."""
    engine = model.engine(slots=4, length=(64, 128))
    question = prompts.question(ask("What is it?"), "here", model.prepare, 1)
    full = 64 - (len(question.tokens) - 1)
    endless = dataclasses.replace(KINDS[1], max_new_tokens=full, suppress_tokens=(model.tokenizer.eos,))
    more = put(engine, question, endless).tokens + model.tokenizer.encode("Where?")
    assert engine.scheduler.device.length == 64 and engine.submit(ask("Left"), GREEDY).result().tokens
    found = put(engine, followed(question, more), GREEDY)
    assert engine.scheduler.device.length == 128
    engine.scheduler.reset()
    agree(found, put(engine, followed(question, more), GREEDY))


def test_a_draw_goes_on_from_its_own_answer(model):
    """When others have taken its slot, what the other draw holds is the prompt, and not this answer."""
    engine = model.engine(slots=2, length=128)
    question, other = (
        prompts.question(ask(text), "here", model.prepare, GREEDY.max_new_tokens) for text in TEXTS[::3]
    )
    first = put(engine, question, dataclasses.replace(KINDS[1], num_return_sequences=2))
    assert first.tokens[0] != first.others[0].tokens[0]
    put(engine, other, GREEDY)
    more = first.tokens + model.tokenizer.encode("Where?")
    found = put(engine, followed(question, more), GREEDY)
    engine.scheduler.reset()
    agree(found, put(engine, followed(question, more), GREEDY))


def test_draws_have_slots_of_their_own_beside_searches(model, warm):
    """Some go on when the first is done."""
    drawn = dataclasses.replace(KINDS[1], max_new_tokens=12, num_return_sequences=3)
    every = lambda answer: (answer, *answer.others)
    handles = [warm.submit(ask(text), drawn, number=i) for i, text in enumerate(TEXTS)]
    found = [every(handle.result()) for handle in handles]
    expected = map(every, model.generate([ask(text) for text in TEXTS], drawn))
    for some, others in zip(found, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            agree(one, other)
    assert any(len(first.tokens) < len(other.tokens) for first, *others in found for other in others)


def test_tokens_of_a_search_come_at_its_end(warm):
    handle = warm.submit(ask("Left"), KINDS[2])
    heard = [(token, handle.done) for token in handle]
    assert heard == [(token, True) for token in handle.result().tokens] and len(heard) > 1


def test_answers_in_columns_of_their_own_need_no_longer_slot(model):
    engine = model.engine(slots=1, length=(64, 128), largest=LARGEST)
    engine.submit(ask(TEXTS[1]), dataclasses.replace(GREEDY, max_new_tokens=32))
    (task,), scheduler = engine.inbox, engine.scheduler
    assert task.end < 64 < task.length and scheduler.make_room(task) and scheduler.device.length == 64


def test_a_long_prompt_is_read_in_pieces_while_others_go_on(model, monkeypatch):
    engine = model.engine(slots=2, length=256, chunks=(64,))
    first = engine.submit(ask("Left"), dataclasses.replace(GREEDY, max_new_tokens=40, forced_eos=True))
    listener = iter(first)
    next(listener)
    long = ask(" ".join(TEXTS * 2))
    second, seen, between = engine.submit(long, GREEDY), read(monkeypatch), []
    while len(seen) < length(model, long) // 64:
        next(listener)
        between.append(len(seen))
    assert max(between) > 1 and max(np.diff(between)) <= 1  # a token after each piece
    agree(second.result(), alone(model, long, GREEDY))


def test_rows_and_their_length_grow(model):
    """What is being answered goes on in the larger cache."""
    engine = model.engine(slots=(1, 2, 4), length=(64, 128, 256))
    handles = [engine.submit(ask("Left"), GREEDY)]
    next(iter(handles[0]))
    sizes = [(engine.scheduler.device.count, engine.scheduler.device.length)]
    handles += [engine.submit(ask(text), GREEDY) for text in (TEXTS[0], " ".join(TEXTS))]
    engine.run()
    sizes.append((engine.scheduler.device.count, engine.scheduler.device.length))
    assert sizes[0] == (1, 64) and sizes[1][0] == 4 and sizes[1][1] > 64
    for handle, text in zip(handles, ("Left", TEXTS[0], " ".join(TEXTS)), strict=True):
        agree(handle.result(), alone(model, ask(text), GREEDY))


def test_no_call_keeps_a_copy_of_what_it_changes(warm):
    """The arrays that a program is given are no more when it returns: their memory is that of its results."""
    warm.submit(ask("Left"), GREEDY).result()
    scheduler, device = warm.scheduler, warm.scheduler.device
    features, nobody = device.features[0], np.zeros(device.count * device.sizes.beams, bool)
    read = np.zeros(device.count, np.int32)
    calls = {
        "encode": features.warm_up,
        "extend": lambda: device.extend(scheduler.chunk([], 1, 64), fresh=False),
        "copy": lambda: device.copy(0, 0),
        "clear": lambda: device.clear(0),
        "advance": lambda: device.advance(Rows(read, nobody, nobody), 1, eager=False),
    }
    for name, call in calls.items():
        before = [features.kept] if name == "encode" else jax.tree.leaves(device.state.cache)
        call()
        assert all(a.is_deleted() for a in before), name
    scheduler.reset()  # row 0 was cleared behind its back


def test_tiles_leave_that_were_asked_for_longest_ago(warm):
    features = warm.scheduler.device.features[0]
    count = len(features.kept)
    tiles = np.random.default_rng(7).integers(0, 256, (count + 1, 24, 24, 3), np.uint8)
    known = names([tiles])

    def show(some):
        assert features.hold([known[i] for i in some], [tiles[some]])
        features.release([known[i] for i in some])

    show(list(range(count)))
    show([0])
    show([count])
    assert [i for i, name in enumerate(known) if name not in features.place] == [1]


def test_numbers_that_are_none_stay_in_their_row(tokenizer):
    """A token whose embedding is not a number spoils the answer to a prompt that has it, and no other."""
    word = tokenizer.encode("square")[-1]
    assert not any(word in tokenizer.encode(text) for text in ("Left", "How many?", tiny.PROMPT))

    def damage(arrays):
        arrays["decoder/embed"][word] = np.nan

    model = made(tokenizer, small(), damage)
    engine = model.engine(slots=2, length=128)
    asked = [(ask(text), GREEDY) for text in ("Left", "square", "How many?", "", "Left", "How many?")]
    # two draws: both of their slots are others' afterwards, whose prompts end before this word
    asked[3] = ask("What is it? square"), dataclasses.replace(KINDS[1], num_return_sequences=2)
    answers = [handle.result() for handle in [engine.submit(*one) for one in asked]]
    for i in (1, 3):
        assert answers[i].finish_reason == "error" and "not finite" in answers[i].error
    for i, again in ((0, 4), (2, 5)):
        assert answers[i].error is None and np.isfinite(answers[i].logprob)
        agree(answers[again], answers[i])


def test_threads_and_event_loops(model):
    asked = drawn(5, 8)
    found = {}
    with model.engine(slots=4, length=192, largest=LARGEST) as engine:

        def wait(i):
            found[i] = engine.submit(*asked[i]).result()

        threads = [threading.Thread(target=wait, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()

        async def listen(i):
            return "".join([piece async for piece in engine.submit(*asked[i])])

        async def both():
            return await asyncio.gather(listen(6), listen(7))

        texts = asyncio.run(both())
        for thread in threads:
            thread.join(60)
        given_up = engine.submit(ask("Left"), dataclasses.replace(GREEDY, max_new_tokens=100))
    for i in range(6):
        agree(found[i], alone(model, *asked[i]))
    assert texts == [alone(model, *asked[i]).text for i in (6, 7)]
    assert given_up.result().error is None or "closed" in given_up.result().error
    assert engine.thread is None and "omnifusion engine" not in [t.name for t in threading.enumerate()]


def test_an_interrupt_leaves_an_engine_that_answers(model, monkeypatch):
    engine = model.engine(slots=2, length=128)
    handle = engine.submit(ask("Left"), GREEDY)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(programs, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            handle.result()
    assert "interrupted" in handle.result().error
    agree(engine.submit(ask("Left"), GREEDY).result(), alone(model, ask("Left"), GREEDY))


BAD = {
    "too long for the model": (ask("circle " * 200), GREEDY, "max_length is 256"),
    "too long for the cache": (
        ask("Left"),
        dataclasses.replace(GREEDY, max_new_tokens=200),
        "exceed the engine's 192",
    ),
    "no picture for a mark": (ask("<image> What?"), GREEDY, "1 <image> mark"),
    "fifty pictures": (ask("What?", *[np.zeros((9, 9, 3), np.uint8)] * 50), GREEDY, "max_length is 256"),
    "empty": (ask(""), GREEDY, "empty"),
    "unknown role": (Request([{"role": "judge", "content": "What?"}]), GREEDY, "judge"),
    "not a request": ("What?", GREEDY, "str"),
    "a token that is none": (ask("Left"), GenerationConfig(banned_tokens=((320,),)), "0 to 319"),
    "too many beams": (ask("Left"), GenerationConfig(max_new_tokens=8, num_beams=5), "beams"),
    "no token is allowed": (
        ask("Left"),
        GenerationConfig(max_new_tokens=4, suppress_tokens=tuple(range(320))),
        "no token may follow the first 0",
    ),
    "more than was warmed up for": (ask("Left"), dataclasses.replace(GREEDY, max_new_tokens=100), "room"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_an_answer_and_the_engine_goes_on(model, warm, name):
    request, generation, says = BAD[name]
    good = warm.submit(ask("Left"), GREEDY)
    bad = warm.submit(request, generation).result()
    assert bad.finish_reason == "error" and bad.tokens == [] and says in bad.error
    agree(good.result(), alone(model, ask("Left"), GREEDY))


@pytest.mark.parametrize("cache", ["model", pytest.param("int8", marks=pytest.mark.sweep)])
def test_a_window_keeps_a_ring_and_the_answers_are_those_of_a_whole_cache(tokenizer, cache):
    """Prompts are longer than the ring, read in pieces, found again, and continued; others are short."""
    c = small(window=50)
    c.decoder.max_length = 640
    model, picture = made(tokenizer, c), np.random.default_rng(3).integers(0, 256, (30, 40, 3), np.uint8)
    long, half = " ".join(TEXTS * 6), " ".join(TEXTS)
    endless = GenerationConfig(max_new_tokens=120, suppress_tokens=(tokenizer.eos,))
    talk = [*ask(long, picture).messages, {"role": "assistant", "content": "Two."}, *ask("Where?").messages]
    ends = (ask(long[:n], picture) for n in range(len(long), 300, -4))
    edge = next(request for request in ends if 182 < length(model, request) % 192 < 190)  # answers go round
    asked = [
        *[(ask(long + " " * i, picture, id=str(i)), g) for i, g in enumerate(KINDS)],
        (edge, KINDS[2]),
        (edge, KINDS[4]),
        (edge, KINDS[3]),
        (ask("Left"), KINDS[2]),
        (ask(long, picture), GREEDY),
        (Request(talk, [picture]), GREEDY),
        (ask(" ".join(TEXTS * 4)), dataclasses.replace(GREEDY, max_new_tokens=100)),
    ]
    found = []
    for chunks in ((64,), (512,)):  # a ring, and all columns
        found.append([])
        # answers in the ring, and behind it
        for some, largest in (([one for one in asked if one[1].num_beams == 1], endless), (asked, LARGEST)):
            engine = model.engine(slots=8, length=640, largest=largest, chunks=chunks, cache=cache)
            handles = [engine.submit(*one) for one in some[:-3]]
            engine.run()
            handles += [engine.submit(*one) for one in some[-3:]]
            found[-1] += [handle.result() for handle in handles]
            assert engine.scheduler.device.state.front == (192 if chunks == (64,) else 640)
            if largest is endless:
                talker = iter(engine.submit(ask(half), endless))
                for _ in range(endless.max_new_tokens - 2):  # it writes over what the next one shares with it
                    next(talker)
                found[-1].append(engine.submit(ask(half[: len(half) // 2]), GREEDY).result())
    assert min(length(model, request) for request, _ in asked if len(request.images)) > 192 + 128
    for ring, whole in zip(*found, strict=True):
        assert ring.error is None
        agree(ring, whole)
    last, answer = length(model, asked[-2][0]) - 1, found[0][-2]
    told = jax.nn.log_softmax(model.logits(asked[-2][0])[0][last])  # without a cache
    near = 0.1 if cache == "int8" else 1e-3
    assert answer.logprobs[0] == pytest.approx(float(told[answer.tokens[0]]), abs=near)


def test_a_cache_of_eight_bits_changes_little(model):
    """Log probabilities are compared with those of the whole sequence, read without a cache."""
    picture = np.random.default_rng(5).integers(0, 256, (30, 40, 3), np.uint8)
    engine = model.engine(slots=2, length=192, cache="int8")
    question = ask(TEXTS[1], picture)
    first, again = (engine.submit(question, GREEDY).result() for _ in range(2))
    assert first.error is None and first.tokens == again.tokens  # the second finds the prompt in the cache
    assert first.logprob == pytest.approx(again.logprob, abs=1e-4)
    scores = model.logits(question)[0]
    told = scores[-1] - np.log(np.exp(scores[-1]).sum())
    assert first.logprobs[0] == pytest.approx(told[first.tokens[0]], abs=0.02)
    held = {leaf.dtype.name for leaf in jax.tree.leaves(engine.scheduler.device.state.cache)}
    assert held == {"int8", "float32"}


def test_beams_branch_in_a_cache_of_eight_bits(model):
    """The log probabilities of every beam are those of its own tokens, read at once and without a cache."""
    asked, g = ask(TEXTS[1]), GenerationConfig(max_new_tokens=10, num_beams=3, num_return_sequences=3)
    answer = model.engine(slots=4, length=192, cache="int8").submit(asked, g).result()
    sample = prompts.lay_out(asked, "here", model.prepare, ask=True)
    for one in (answer, *answer.others):
        more = np.zeros((3, len(one.tokens)), np.int32)
        more[0] = one.tokens
        columns = [np.concatenate(pair) for pair in zip(sample[:3], more, strict=True)]
        whole = sample._replace(
            **dict(zip(("tokens", "kind", "index"), columns, strict=True)), weights=np.zeros(len(columns[0]))
        )
        scores = jax.nn.log_softmax(model.module(prompts.assemble([whole], model.prepare))[0])
        there = len(sample.tokens) - 1 + np.arange(len(one.tokens))
        np.testing.assert_allclose(one.logprobs, scores[there, np.array(one.tokens)], atol=0.1)


def test_a_cache_is_of_the_model_or_of_eight_bits(model):
    with pytest.raises(ConfigError, match="cache is 'int4'; choose from model, int8"):
        model.engine(cache="int4")
