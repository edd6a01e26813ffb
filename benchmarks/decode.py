"""Measures reading a prompt with a picture, and decoding, beside transformers with the same weights.

python benchmarks/decode.py [--batches=1,8,32,128] [--new=64] [--rounds=5] [--dtype=float32] [--tiny]

Every round has pictures and questions of its own, so that nothing is known from before. A side answers them
once with one token, which is the prefill, and once with `new` more, which are the decoding. Sides are
processes of their own and take turns. The bound: a step reads the weights and the cache once, as fast as this
machine copies memory or multiplies a matrix by a vector, whichever is faster; they take turns with the sides.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from llava_pair import SIDES, make
from sides import Side, machine

PAIR = str(Path(__file__).with_name("llava_pair.py"))
LARGE = 8192  # rows of the matrix of which the bandwidth is measured


def exactly(new):
    """Settings for answers of so many tokens."""
    return {"max_new_tokens": new, "min_new_tokens": new}


def begin(name, model, dtype, cache):
    """A side, and the seconds from its start to its first token."""
    one = Side([PAIR, name, str(model), dtype], os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)})
    one.ask("generate", seed=1, count=1, batch_size=1, settings=exactly(1))
    return one, time.perf_counter() - one.started


def start(model, dtype, cache):
    """The sides, after saying how long each took to its first token."""
    sides = {}
    for name in SIDES:
        sides[name], cold = begin(name, model, dtype, cache)
        if name == "ours":
            sides[name].end()
            sides[name], cached = begin(name, model, dtype, cache)
            print(f"{name}: {cold:.1f} s from the start of the process to its first token, ", end="")
            print(f"{cached:.1f} s with the compiled programs of another on the disk")
        else:
            print(f"{name}: {cold:.1f} s from the start of the process to its first token")
    return sides


def measure(sides, batch, new, rounds, size):
    """Medians of what the sides took by turns.

    Returns: {side: (seconds to the first tokens, seconds of a step after them)}, bytes a second by way of
      reading them, and the share of equal answers.
    """
    ask = lambda one, seed, n: one.ask(
        "generate", seed=seed, count=batch, batch_size=batch, settings=exactly(n)
    )
    for one in sides.values():
        for n in (1, 1 + new):
            ask(one, 2, n)  # compiles
    times, rates, agree = {name: [] for name in sides}, [], []
    for seed in range(10, 10 + rounds):
        rates.append(sides["ours"].ask("bandwidth", size=size))
        answers = []
        for name, one in sides.items():
            # the second question is about other pictures: nothing of it is known from the first
            first, all = ask(one, seed, 1), ask(one, 1000 + seed, 1 + new)
            times[name].append((first["seconds"], all["seconds"]))
            answers.append(all["tokens"])
        agree += [a == b for a, b in zip(*answers, strict=True)]
    found = {}
    for name, seconds in times.items():
        first, all = (median(column) for column in zip(*seconds, strict=True))
        found[name] = first, (all - first) / new
    return found, {way: median(rate[way] for rate in rates) for way in rates[0]}, sum(agree) / len(agree)


COLUMNS = ("prefill tok/s", "first token s", "decode tok/s", "of the bound", "GB/s", "ratio", "equal")


def show(sides, batches, new, rounds, tiny):
    facts = sides["ours"].ask("facts")
    print(f"{facts['device']}; {facts['weights'] / 1e6:.0f} MB of weights a step")
    print(f"{'batch':>5} {'':12}", *(f"{column:>13}" for column in COLUMNS))
    prompt = facts["prompt"]
    for batch in batches:
        found, rates, equal = measure(sides, batch, new, rounds, 256 if tiny else LARGE)
        read = facts["weights"] + batch * (prompt + new / 2) * facts["position"]
        least = read / max(rates.values())
        for name, (first, step) in found.items():
            cells = (
                f"{batch * prompt / first:,.0f}",
                f"{first:.3f}",
                f"{batch / step:,.1f}",
                f"{least / step:.0%}",
                f"{read / step / 1e9:.1f}",
            )
            if name == "ours":
                cells += (f"{found['transformers'][1] / step:.2f}", f"{equal:.0%}")
            print(f"{batch:5} {name:12}", *(f"{cell:>13}" for cell in cells), flush=True)
        print("      bound, GB/s:", ", ".join(f"{way} {rate / 1e9:.1f}" for way, rate in rates.items()))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    print(machine("jax", "flax", "torch", "transformers"))
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder, "model"), given.tiny)
        sides = start(Path(folder, "model"), given.dtype, Path(folder, "cache"))
        show(sides, map(int, given.batches.split(",")), given.new, given.rounds, given.tiny)
        for one in sides.values():
            one.end()


if __name__ == "__main__":
    main()
