"""Runs the sampler on a bare decoder, and counts what gets compiled."""

import contextlib
import dataclasses
import types

import jax
import numpy as np

from omnifusion_jax.batch import FEATURE
from omnifusion_jax.config import DecoderConfig
from omnifusion_jax.inference import options
from omnifusion_jax.inference.answer import answer
from omnifusion_jax.inference.engine import programs
from omnifusion_jax.models.decoder import Decoder
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.stack import unstack

EOS, PAD = 2, 0
CONFIG = DecoderConfig(
    vocab=24, width=32, layers=1, heads=4, kv_heads=2, head_dim=8, mlp=48, window=9, max_length=256
)
PROMPT, ROOM = 16, 24


def arrays(seed, sharpness=3.0, eos=1.0, c=CONFIG):
    """Random parameters by path.

    A sharp head makes choices clear; `eos` scales the scores of the end of sequence.
    """
    found = {path: np.array(a) for path, a in nnx.parameters(Decoder(c, rngs=nnx.Rngs(seed))).items()}
    rng = np.random.default_rng(seed)
    for path in found:
        if path.endswith("/bias"):  # drawn as zeros, which would hide mistakes
            found[path] += rng.normal(size=found[path].shape).astype(np.float32) * 0.3
    head = found["embed"].T if c.tied else found["head"]
    head *= sharpness
    head[:, EOS] *= eos
    return found


def decoder(arrays, c=CONFIG):
    """A Decoder in list form."""
    made = nnx.with_parameters(
        nnx.eval_shape(lambda: Decoder(c, rngs=nnx.Rngs(0))),
        {path: jax.numpy.asarray(a) for path, a in arrays.items()},
    )
    made.layers = unstack(made.layers)
    return made


def prompts(seed, count, c=CONFIG):
    """Embeddings float32[T, width] of unequal lengths."""
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=(n, c.width)).astype(np.float32) * 0.3 for n in rng.integers(1, PROMPT + 1, count)
    ]


def pad(prompts):
    """(x, segments, positions), padded on the left."""
    x = np.zeros((len(prompts), PROMPT, prompts[0].shape[1]), np.float32)
    segments, positions = np.zeros((2, len(prompts), PROMPT), np.int32)
    for row, prompt in enumerate(prompts):
        here = np.s_[row, PROMPT - len(prompt) :]
        x[here], segments[here], positions[here] = prompt, 1, np.arange(len(prompt))
    return x, segments, positions


NAMES = types.SimpleNamespace(eos=EOS, pad=PAD, decode=str)


def asked(generation, count, vocab=CONFIG.vocab):
    """(Options of the rows that answer `count` prompts, Sizes)."""
    sizes = options.Sizes(vocab, ROOM).join(options.needs(generation, NAMES, vocab))
    table = options.blank(count * generation.num_beams, sizes)
    for i in range(count):
        found = options.options(generation, NAMES, sizes, i)
        options.write(table, np.s_[i * generation.num_beams : (i + 1) * generation.num_beams], found)
    return table, sizes


class Bare(nnx.Module):
    """A model without encoders: rows of its prompts count as features that are made already."""

    special = None

    def __init__(self, decoder):
        self.decoder = decoder


def begun(decoder, prompts, sizes):
    """(the State of an engine in which each prompt is read, in a slot of its own; what is read of each)."""
    count = np.array([len(prompt) for prompt in prompts], np.int32)
    kept, columns = np.zeros((len(prompts), PROMPT, decoder.config.width), np.float32), np.arange(PROMPT)
    for row, prompt in enumerate(prompts):
        kept[row, : len(prompt)] = prompt
    index = (np.arange(len(prompts))[:, None] * PROMPT + columns).astype(np.int32)
    kind = np.where(columns < count[:, None], FEATURE, 0).astype(np.int32)
    none = np.zeros(len(prompts), np.int32)
    chunk = programs.Chunk(None, none == 0, none, count - 1, np.zeros_like(index), kind, index)
    state = programs.start(decoder, len(prompts), PROMPT + ROOM * sizes.beams, sizes)
    return programs.extend(Bare(decoder), [kept], state, chunk, fresh=True), count - 1


def answers(decoder, prompts, generations, tokenizer, sizes):
    """The Answer to each prompt, each with a GenerationConfig of its own; None where it allows no token."""
    each = max(map(options.slots_of, generations))
    table = options.blank(len(prompts) * each * sizes.beams, sizes)
    taken, rows = np.zeros(len(table.limit), bool), []
    for i, g in enumerate(generations):
        slots = range(i * each, i * each + options.slots_of(g))
        rows.append([slot * sizes.beams + beam for slot in slots for beam in range(g.num_beams)])
        options.write(table, rows[i], options.options(g, tokenizer, sizes, i))
        taken[rows[i]] = True
    state, read = begun(decoder, [prompt for prompt in prompts for _ in range(each)], sizes)
    state, _ = programs.advance(
        decoder, state, programs.Rows(read, taken, taken), table, np.int32(ROOM), np.bool_(False), sizes
    )
    texts, stuck = jax.device_get((state.search.answers(table), state.search.stuck))
    return [
        None if stuck[own].any() else answer(g, tokenizer, texts, own)
        for own, g in zip(rows, generations, strict=True)
    ]


def generate(decoder, prompts, generation, limit=ROOM):
    """(tokens, logprob) of each prompt's answer."""
    generation = dataclasses.replace(generation, max_new_tokens=limit)
    table, sizes = asked(generation, len(prompts))
    state, read = begun(decoder, prompts, sizes)
    everyone = np.ones(len(table.limit), bool)
    rows = programs.Rows(read, everyone, everyone)
    state, _ = programs.advance(decoder, state, rows, table, np.int32(limit), np.bool_(False), sizes)
    found = jax.device_get(state.search.answers(table))
    best = range(0, len(found.length), generation.num_beams)
    lengths = {row: found.length[row] for row in best}
    return [
        (found.tokens[row, :n].tolist(), float(found.logprobs[row, :n].sum())) for row, n in lengths.items()
    ]


@contextlib.contextmanager
def compiled():
    """A list that grows by one entry a program compiled."""
    seen = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
