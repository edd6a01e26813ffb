"""Measures a ragged set of questions about pictures, answered in three ways with the same weights.

python benchmarks/batch_vqa.py [--questions=256] [--slice=64] [--batch=16] [--dtype=float32] [--tiny]

    ours        this package, `generate` over a slice of them
    one by one  transformers, a question at a time, as the recipe published with OmniFusion asks
    padded      transformers, in the order in which they come, padded to the longest of their batch

All search three beams of up to 50 tokens, without repeating four tokens, as that recipe does. Questions have
4 to 400 words, each a picture of its own. Processes of their own take turns, a slice of the questions each.
Before that ours answers as many other questions, which tells what compiling costs.
"""

import argparse
import tempfile
from pathlib import Path

from llava_pair import make
from sides import Side, machine

PAIR = str(Path(__file__).with_name("llava_pair.py"))
RECIPE = {"num_beams": 3, "max_new_tokens": 50, "early_stopping": True, "no_repeat_ngram_size": 4}
WORDS = {"shortest": 4, "longest": 400}
WAYS = {"ours": "ours", "one by one": "transformers", "padded": "transformers"}


def measure(sides, batch, count, step):
    """Seconds of ours while it compiles, and {way: (seconds, tokens of each answer)} when it does not."""

    def answered(way, seed, count):
        found = sides[WAYS[way]].ask(
            "generate",
            seed=seed,
            count=count,
            batch_size=1 if way == "one by one" else batch,
            settings=RECIPE,
            words=WORDS,
        )
        return found["seconds"], found["tokens"]

    slices = range(0, count, step)
    first = [answered("ours", 1000 + seed, step) for seed in slices]
    answered("one by one", 1000, 1)
    parts = {way: [] for way in WAYS}
    for seed in slices:
        for way in WAYS:
            parts[way].append(answered(way, seed, step))
    joined = lambda some: (sum(seconds for seconds, _ in some), [a for _, found in some for a in found])
    return joined(first)[0], {way: joined(some) for way, some in parts.items()}


COLUMNS = ("seconds", "questions/s", "tokens/s", "ours faster", "equal answers")


def show(compiling, found):
    ours, expected = found["ours"][0], found["one by one"][1]
    lengths = sorted(map(len, expected))
    middle, most = lengths[len(lengths) // 2], lengths[-1]
    print(f"{len(expected)} questions; answers of {lengths[0]} to {most} tokens, the median {middle}")
    print(f"ours took {compiling:.1f} s over as many questions before, when it compiled what they need")
    print(f"{'':12}", *(f"{column:>14}" for column in COLUMNS))
    for way, (seconds, answers) in found.items():
        equal = sum(a == b for a, b in zip(answers, expected, strict=True)) / len(expected)
        cells = (
            f"{seconds:.1f}",
            f"{len(answers) / seconds:.2f}",
            f"{sum(map(len, answers)) / seconds:.0f}",
            f"{seconds / ours:.2f} x",
            f"{equal:.0%}",
        )
        print(f"{way:12}", *(f"{cell:>14}" for cell in cells))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--slice", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    print(machine("jax", "flax", "torch", "transformers"))
    with tempfile.TemporaryDirectory() as model:
        make(Path(model), given.tiny)
        sides = {name: Side([PAIR, name, model, given.dtype]) for name in set(WAYS.values())}
        show(*measure(sides, given.batch, given.questions, given.slice))
        for one in sides.values():
            one.end()


if __name__ == "__main__":
    main()
