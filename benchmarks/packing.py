"""Measures how full rows are: one dialogue a row, rows of like length, first-fit, and what this library does.

python benchmarks/packing.py

The dialogues are drawn with lengths like those of LLaVA-v1.5-665K: each of its parts with its number of
records and a log-normal distribution of the tokens of its text, with 576 more for a picture. The medians and
spreads are rough; what matters is that lengths spread over 600 to 2048 tokens and most records have a
picture.
"""

import numpy as np

from omnifusion_jax.data.packing import Fullest

PICTURE, LONGEST, RECORDS, ROWS = 576, 2048, 60_000, 16
# part: (thousand records, median tokens of its text, standard deviation of their logarithm, pictures)
PARTS = {
    "conversation": (58, 350, 0.35, 1),
    "detailed description": (23, 230, 0.30, 1),
    "complex reasoning": (77, 330, 0.30, 1),
    "ShareGPT (text)": (40, 1200, 0.70, 0),
    "VQAv2": (83, 150, 0.50, 1),
    "GQA": (72, 250, 0.50, 1),
    "OK-VQA": (9, 45, 0.30, 1),
    "OCR-VQA": (80, 150, 0.30, 1),
    "A-OKVQA": (66, 110, 0.40, 1),
    "TextCaps": (22, 70, 0.30, 1),
    "RefCOCO": (48, 270, 0.40, 1),
    "Visual Genome": (86, 260, 0.40, 1),
}


def drawn(seed=0):
    """(tokens, pictures) of RECORDS dialogues in random order."""
    rng = np.random.default_rng(seed)
    records, median, spread, pictures = map(np.array, zip(*PARTS.values(), strict=True))
    part = rng.choice(len(PARTS), RECORDS, p=records / records.sum())
    text = np.exp(np.log(median[part]) + spread[part] * rng.standard_normal(RECORDS)).astype(int) + 12
    return np.minimum(text + PICTURE * pictures[part], LONGEST), pictures[part]


def first_fit(length, tiles, window):
    """Takes whatever still fits, in the order of age."""

    def choose(waiting):
        chosen, tokens, media = [], 0, 0
        for i, (n, shown) in enumerate(waiting):
            if tokens + n <= length and media + shown <= tiles:
                chosen.append(i)
                tokens, media = tokens + n, media + shown
        return chosen

    choose.window = window
    return choose


def fill(choose, sizes, length, tiles):
    """Shares of positions and tiles that are real, of rows that each take every ROWS-th record."""
    rows, tokens, shown = 0, 0, 0
    for first in range(ROWS):
        coming, waiting = iter(sizes[first::ROWS]), []
        while True:
            while len(waiting) < choose.window and (one := next(coming, None)) is not None:
                waiting.append(one)
            if len(waiting) < choose.window:
                break
            chosen = choose(waiting)
            rows, tokens = rows + 1, tokens + sum(waiting[i][0] for i in chosen)
            shown += sum(waiting[i][1] for i in chosen)
            waiting = [one for i, one in enumerate(waiting) if i not in set(chosen)]
    return tokens / (rows * length), shown / (rows * tiles)


def main():
    lengths, pictures = drawn()
    sizes = list(zip(lengths.tolist(), pictures.tolist(), strict=True))
    steps = np.percentile(lengths, [1, 10, 25, 50, 75, 90, 99]).astype(int)
    print(f"{RECORDS:,} dialogues: mean {lengths.mean():.0f} tokens, {pictures.mean():.2f} pictures")
    print("percentiles 1 10 25 50 75 90 99:", *steps)
    print(f"{'':46} {'positions':>9} {'tiles':>7}")
    print(f"{'one a row, padded to 2048':46} {lengths.mean() / LONGEST:9.1%} {pictures.mean():7.1%}")
    bucketed = lengths.sum() / (-(-lengths // 256) * 256).sum()
    print(f"{'one a row, padded to the next of 8 lengths':46} {bucketed:9.1%} {pictures.mean():7.1%}")
    for length, tiles, window in [
        (2048, 2, 16),
        (4096, 5, 16),
        (4096, 5, 32),
        (8192, 10, 16),
        (8192, 10, 32),
    ]:
        for name, choose in (
            ("first-fit", first_fit(length, tiles, window)),
            ("fullest row", Fullest(window, length, tiles)),
        ):
            positions, shown = fill(choose, sizes, length, tiles)
            what = f"{name}, rows of {length}, {tiles} tiles, window {window}"
            print(f"{what:46} {positions:9.1%} {shown:7.1%}", flush=True)


if __name__ == "__main__":
    main()
