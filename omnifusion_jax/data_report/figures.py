"""The figures of a set of data, as report.json has them.

records     looked at; `of` as many as there are, null without an end
usable      that training takes, and learns from
skipped     {reason: records that cannot be used, or that teach nothing}
too_long    left out for that alone (data.on_long=skip)
cut         dialogues that lost turns or, in the layout "original", fill max_length
lost        share of the records that are cut or left out
tokens      of the laid-out dialogues that training takes: sum, smallest, median, p95 and largest, and
            `counts`, a histogram whose bins have `width` tokens each: 1 to width, width + 1 to ...
pictures    number of them; sizes {class of width x height: number}; tiles {tiles: number of pictures}
scripts     {script: share of the answers}
unread      {key that nothing reads: records that have it}, of those that training takes
repeated    dialogues (by what is said) and pictures (by a perceptual hash that scaled or compressed
            copies share): `times`, rows [n, m] that say n of them occur m times each, and `most`, places
            of one that occurs most often
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from omnifusion_jax.data_report.classes import OTHER, SCRIPTS
from omnifusion_jax.data_report.gather import LONG, USABLE, Found

BINS = 16  # of the histogram of lengths, up to max_length
PLACES = 3  # named of what is repeated


def figures(found: Sequence[Found], max_length: int, where: Callable[[int], str]) -> dict:
    """The figures of a set, or of several as one; `where` gives the place of a record of the mixture."""
    taken = np.concatenate([one.taken for one in found])
    indices = np.concatenate([one.first + one.places for one in found])
    states = np.concatenate([one.records["state"] for one in found])
    hashes = np.concatenate([one.hashes for one in found])
    looked, cut = sum(one.looked for one in found), int(taken["cut"].sum())
    sizes, tiles, scripts, unread = (
        total(one.counts[name] for one in found) for name in ("sizes", "tiles", "scripts", "unread")
    )
    return {
        "records": looked,
        "of": None if any(one.endless for one in found) else len(states),
        "usable": int((states == USABLE).sum()),
        "skipped": total(
            {reason: problem.count for reason, problem in one.problems.items()} for one in found
        ),
        "too_long": int((states == LONG).sum()),
        "cut": cut,
        "lost": share(looked - len(taken) + cut, looked),
        "tokens": lengths(taken["tokens"], max_length),
        "pictures": {"number": len(hashes), "sizes": sizes, "tiles": dict(sorted(tiles.items()))},
        "scripts": {name: share(scripts.get(name, 0), sum(scripts.values())) for name in (*SCRIPTS, OTHER)},
        "unread": unread,
        "repeated": {
            "dialogues": repeated(taken["text"], indices, where),
            "pictures": repeated(hashes, np.repeat(indices, taken["pictures"]), where),
        },
    }


def total(counts: Iterable[dict]) -> dict:
    """The sum of several {name: number}, the most frequent first."""
    summed = {}
    for one in counts:
        for name, number in one.items():
            summed[name] = summed.get(name, 0) + number
    return dict(sorted(summed.items(), key=lambda item: (-item[1], str(item[0]))))


def share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def lengths(tokens: np.ndarray, max_length: int) -> dict | None:
    """What is told of the lengths int32[records]; None of no records."""
    if not len(tokens):
        return None
    width = -(-max_length // BINS)
    return {
        "sum": int(tokens.sum(dtype=np.int64)),
        "smallest": int(tokens.min()),
        "median": float(np.median(tokens)),
        "p95": float(np.percentile(tokens, 95)),
        "largest": int(tokens.max()),
        "width": width,
        "counts": np.bincount((tokens - 1) // width, minlength=BINS).tolist(),
    }


def repeated(hashes: np.ndarray, indices: np.ndarray, where: Callable[[int], str]) -> dict:
    """What occurs more than once of uint64[n], the hashes of things in the records int[n]."""
    distinct, times = np.unique(hashes, return_counts=True)
    often, number = np.unique(times[times > 1], return_counts=True)
    most = []
    if len(often):
        most = np.unique(indices[hashes == distinct[times.argmax()]])[:PLACES].tolist()
    rows = [[int(n), int(m)] for n, m in zip(number[::-1], often[::-1], strict=True)]
    return {"times": rows, "most": list(map(where, most))}
