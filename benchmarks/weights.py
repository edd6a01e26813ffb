"""Measures what weights of a decoder are kept in: speed, memory, and how far it is from the plain model.

    python benchmarks/weights.py [--batch=1,8] [--tokens=64] [--rounds=5] [--count=200] [--apart]

Speed: decoding of a random decoder of 44 million parameters (8 layers, width 512, tied vocabulary of 32,000),
by turns, as seconds that the later tokens of an answer take; with --apart, beside the same with maps of
one input apart, which `of.load` joins. Distance: the bundled model on questions about held-out pictures.
"""

import argparse
import statistics
import time

import jax
import numpy as np

import omnifusion_jax as of
from omnifusion_jax.checkpoints.base import WEIGHTS, kept_as
from omnifusion_jax.checkpoints.checkpoint import Checkpoint
from omnifusion_jax.checkpoints.joined import joined
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.checkpoints.storage.lazy_array import lazy
from omnifusion_jax.checkpoints.storage.placement import for_answers
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.evaluation.comparison import compare
from omnifusion_jax.inference.model import Model
from omnifusion_jax.models.answering import weighed
from omnifusion_jax.models.presets import preset

SIZES = {"width": 512, "layers": 8, "heads": 8, "kv_heads": 8, "head_dim": 64, "mlp": 1536, "vocab": 32000}
FIRST = 8  # tokens of the shorter answer: what the longer one takes beyond it is decoding alone
WORDS = "What stands at the left? " * 20


def random_model() -> Checkpoint:
    c = preset("omnifusion-tiny")
    for name, value in (SIZES | {"tied": True, "window": None, "max_length": 2048}).items():
        setattr(c.decoder, name, value)
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32) * 0.03
    arrays = {path: lazy(draw(shape)) for path, shape in shapes_of(c).items()}
    return Checkpoint(c, arrays, locate("omnifusion-tiny-decoder"), "random")


def answerer(checkpoint, weights, apart=False):
    found = kept_as(weights, checkpoint)
    arrays = found.arrays if apart else joined(found.config, found.arrays)
    tokenizer = Tokenizer(found.tokenizer).for_vocabulary(found.config.decoder.vocab)
    return Model(found.config, for_answers(arrays), tokenizer)


def seconds(model, batch, tokens):
    requests = [of.Request([{"role": "user", "content": WORDS}])] * batch
    start = time.perf_counter()
    said = model.generate(requests, of.GenerationConfig(max_new_tokens=tokens), batch_size=batch)
    assert all(len(a.tokens) == tokens for a in said), "an answer ended early"
    return time.perf_counter() - start


def speed(models, batch, tokens, rounds):
    """Prints tokens/s of every model, which take turns."""
    taken = {name: [] for name in models}
    for number in range(rounds + 1):  # the first round compiles
        for name, model in models.items():
            longer, shorter = (seconds(model, batch, n) for n in (FIRST + tokens, FIRST))
            if number:
                taken[name].append((longer - shorter) / tokens)
    for name, found in taken.items():
        step = statistics.median(found)
        times = statistics.median(a / b for a, b in zip(taken["plain"], found, strict=True))
        fastest = min(taken["plain"]) / min(found)
        held = weighed(models[name].module)["decoder"] / 1e6
        print(
            f"{batch:>5} {name:12} {held:7.1f} MB {batch / step:8.1f} tokens/s {times:6.2f} x plain, "
            f"the fastest round of each {fastest:6.2f} x",
            flush=True,
        )


def main(batches, tokens, rounds, count, apart):
    checkpoint = random_model()
    models = {weights: answerer(checkpoint, weights) for weights in WEIGHTS}
    if apart:
        models |= {f"{weights} apart": answerer(checkpoint, weights, apart=True) for weights in WEIGHTS}
    print(f"{jax.devices()[0].device_kind}, {sum(a.size for a in checkpoint.arrays.values()):,} parameters")
    for batch in batches:
        speed(models, batch, tokens, rounds)
    plain, source = of.load("omnifusion-tiny", dtype="float32"), open_source("synthetic:held-out", "", 6)
    for weights in WEIGHTS[1:]:
        found = compare(plain, of.load("omnifusion-tiny", dtype="float32", weights=weights), source, count)
        print(f"{weights}: KL {found['kl']:.1e}, top-1 {found['top_1']:.2%}, answers {found['answers']:.1%}")


if __name__ == "__main__":
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=200, help="dialogues; 0: no distance")
    parser.add_argument("--apart", action="store_true")
    given = parser.parse_args()
    batches = [int(n) for n in given.batch.split(",")]
    main(batches, given.tokens, given.rounds, given.count, given.apart)
