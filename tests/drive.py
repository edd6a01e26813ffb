"""Runs the sampler on a bare decoder, and counts what gets compiled."""

import contextlib
import dataclasses
import types

import jax
import numpy as np

from omnifusion_jax.config import DecoderConfig
from omnifusion_jax.inference import decode, options
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


NAMES = types.SimpleNamespace(eos=EOS, pad=PAD)


def asked(generation, count, vocab=CONFIG.vocab):
    """(Options of the rows that answer `count` prompts, Sizes)."""
    sizes = options.Sizes(vocab, ROOM).join(options.needs(generation, NAMES, vocab))
    table = options.blank(count * generation.num_beams, sizes)
    for i in range(count):
        found = options.options(generation, NAMES, sizes, i)
        options.write(table, i * generation.num_beams, found)
    return table, sizes


def generate(decoder, prompts, generation, limit=ROOM):
    """(tokens, logprob) of each prompt's answer."""
    generation = dataclasses.replace(generation, max_new_tokens=limit)
    table, sizes = asked(generation, len(prompts))
    state = decode.start(decoder, *pad(prompts), table, sizes)
    state = decode.advance(decoder, state, np.int32(limit), sizes)
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
