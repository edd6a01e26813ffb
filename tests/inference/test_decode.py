"""The sampler on a bare decoder."""

import dataclasses
import re

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.inference.engine import programs
from omnifusion_jax.inference.options import Sizes
from omnifusion_jax.inference.processors import So, process
from omnifusion_jax.inference.search import Search
from omnifusion_jax.nn.attend import AttentionSpec, Places

DEEP = dataclasses.replace(drive.CONFIG, layers=2)
VOCAB = drive.CONFIG.vocab


run = jax.jit(lambda decoder, *args: decoder(*args))
places = lambda segments, positions: Places(segments, positions, positions)


@pytest.fixture(scope="module")
def decoder():
    return drive.decoder(drive.arrays(0, eos=0.6))


def test_a_cache_changes_nothing():
    decoder = drive.decoder(drive.arrays(3, c=DEEP), DEEP)
    x, segments, positions = drive.pad(drive.prompts(3, 5))
    length, rest = x.shape[1], 5
    more = np.random.default_rng(0).normal(size=(5, rest, DEEP.width)).astype(np.float32)
    whole = np.concatenate([x, more], axis=1)
    segments = np.pad(segments, ((0, 0), (0, rest)), constant_values=1)
    positions = np.concatenate([positions, positions[:, -1:] + 1 + np.arange(rest)], axis=1)
    full, _ = run(decoder, whole, AttentionSpec.of(segments, positions, DEEP.window))

    cache = decoder.init_cache(5, length + rest, jnp.float32)
    for begin, end in ((0, length), *((i, i + 1) for i in range(length, length + rest))):
        spec = AttentionSpec(
            places(segments[:, begin:end], positions[:, begin:end]), places(segments, positions), DEEP.window
        )
        hidden, cache = run(decoder, whole[:, begin:end], spec, cache, np.full(5, begin))
        real = segments[:, begin:end, None] > 0
        np.testing.assert_allclose(
            decoder.logits(hidden) * real, decoder.logits(full[:, begin:end]) * real, atol=2e-5
        )


def test_rows_of_different_age_in_one_step():
    """Each is written at a place of its own, and equals what it is alone and without a cache."""
    c, rng = DEEP, np.random.default_rng(5)
    decoder, ages, steps, length = drive.decoder(drive.arrays(5, c=DEEP), DEEP), np.array([2, 13, 7]), 3, 16
    x = rng.normal(size=(3, length, c.width)).astype(np.float32)
    positions = np.broadcast_to(np.arange(length), x.shape[:2])
    segments = (positions < ages[:, None]).astype(np.int32)  # what comes after its age is not there yet
    _, cache = run(
        decoder,
        x,
        AttentionSpec.of(segments, positions, c.window),
        decoder.init_cache(3, length, jnp.float32),
        np.zeros(3, int),
    )
    found = []
    for step in range(steps):
        at = ages + step
        segments = (positions <= at[:, None]).astype(np.int32)
        spec = AttentionSpec(
            places(np.ones((3, 1), np.int32), at[:, None]), places(segments, positions), c.window
        )
        hidden, cache = run(decoder, x[np.arange(3), at][:, None], spec, cache, at)
        found.append(hidden[:, 0])
    for row, age in enumerate(ages):
        alone, _ = run(
            decoder,
            x[row : row + 1],
            AttentionSpec.of(np.ones((1, length), np.int32), positions[:1], c.window),
        )
        np.testing.assert_allclose([hidden[row] for hidden in found], alone[0, age : age + steps], atol=2e-5)


def test_padding_left_equals_padding_right():
    decoder = drive.decoder(drive.arrays(4, c=DEEP), DEEP)
    prompts = drive.prompts(4, 5)
    left, _ = run(decoder, (padded := drive.pad(prompts))[0], AttentionSpec.of(*padded[1:], DEEP.window))
    turned = [
        np.stack([np.roll(row, len(p), axis=0) for row, p in zip(a, prompts, strict=True)]) for a in padded
    ]
    right, _ = run(decoder, turned[0], AttentionSpec.of(*turned[1:], DEEP.window))
    for row, p in enumerate(prompts):
        np.testing.assert_allclose(left[row, -len(p) :], right[row, : len(p)], atol=2e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_logprob_is_the_sum_over_the_tokens(decoder, beams):
    prompts = drive.prompts(5, 8)
    answers = drive.generate(
        decoder, prompts, GenerationConfig(num_beams=beams, no_repeat_ngram_size=2, forced_eos=True), limit=9
    )
    x = np.zeros((8, drive.PROMPT + 9, drive.CONFIG.width), np.float32)
    for row, prompt, (tokens, _) in zip(x, prompts, answers, strict=True):
        row[: len(prompt)], row[len(prompt) :][: len(tokens)] = prompt, decoder.embed[...][np.array(tokens)]
    everywhere = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    hidden, _ = run(decoder, x, AttentionSpec.of(np.ones_like(everywhere), everywhere, drive.CONFIG.window))
    scores = np.asarray(jax.nn.log_softmax(decoder.logits(hidden)))
    for row, prompt, (tokens, logprob) in zip(scores, prompts, answers, strict=True):
        np.testing.assert_allclose(
            logprob, row[len(prompt) - 1 + np.arange(len(tokens)), tokens].sum(), atol=2e-4
        )


def test_the_limit_is_no_matter_of_compilation(decoder):
    prompts = drive.prompts(6, 8)
    drive.generate(decoder, prompts, GenerationConfig(), limit=20)
    with drive.compiled() as programs:
        long, short = (drive.generate(decoder, prompts, GenerationConfig(seed=n), limit=n) for n in (20, 5))
    assert not programs
    assert [tokens[:5] for tokens, _ in long] == [tokens for tokens, _ in short]


@pytest.mark.parametrize(("rows", "beams"), [(1, 1), (4, 1), (4, 3), (1, 3)])
def test_no_step_copies_the_cache(decoder, rows, beams):
    """A copy of the whole cache for every token would cost more than the token."""
    g = GenerationConfig(max_new_tokens=drive.ROOM, num_beams=beams)
    table, sizes = drive.asked(g, rows)
    state, read = drive.begun(decoder, drive.prompts(8, rows), sizes)
    everyone = np.ones(rows * beams, bool)
    rows = programs.Rows(read, everyone, everyone)
    lowered = programs.advance.lower(decoder, state, rows, table, np.int32(9), np.bool_(False), sizes)
    program = lowered.compile().as_text()
    shape = ",".join(map(str, state.cache[0][0].shape)).removeprefix("1,")
    assert re.search(rf"f32\[{shape}\]", program)
    assert not re.search(rf"f32\[(1,)?{shape}\]\S* copy\(", program)


def test_sampling_follows_the_distribution():
    rows, sizes = 20000, Sizes(VOCAB, 2)
    g = GenerationConfig(max_new_tokens=2, temperature=0.8, top_k=10, top_p=0.9)
    table = jax.tree.map(lambda a: np.repeat(a, rows, axis=0), drive.options.options(g, drive.NAMES, sizes))
    table.name[:] = np.arange(2 * rows).reshape(-1, 2)
    scores = jnp.broadcast_to(
        jnp.asarray(np.random.default_rng(0).normal(size=VOCAB) * 2, jnp.float32), (rows, VOCAB)
    )
    choose = jax.jit(Search.choose, static_argnames="sizes")
    start = Search.start(rows, sizes).restart(np.ones(rows, bool), table)
    drawn = choose(start, scores, table, sizes=sizes)
    none = So(np.zeros((rows, 2), np.int32), np.zeros(rows, np.int32))
    expected = np.asarray(jax.nn.softmax(process(scores, none, table, np.ones(rows, bool))))[0]
    found = np.bincount(drawn.running.tokens[:, 0], minlength=VOCAB) / rows
    assert (found[expected == 0] == 0).all() and (expected > 0).sum() < 10
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / rows**0.5)
    again = choose(drawn, scores, table, sizes=sizes)
    assert (again.running.tokens[:, 1] != again.running.tokens[:, 0]).any()  # another step, other numbers
