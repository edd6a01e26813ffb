"""Shows what alignment does to a model that names what is not there, within 12 minutes on two CPU cores.

    python examples/align.py WORKDIR

1. habit       omnifusion-tiny learns to describe pictures, and to name something absent in most of them
2. pairs       it describes other pictures, and its descriptions are corrected, as people did it for RLHF-V
3. dpo, dense  from these pairs it learns to leave the habit, by DPO and by dense DPO
4. figures     of each model: how much of what it says is not there, and how many questions it answers right

and writes WORKDIR/summary.json and WORKDIR/report.html. What is finished is not repeated.
"""

import html
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import omnifusion_jax as of
from omnifusion_jax.config import CheckpointConfig, DataConfig, OptimizerConfig, PreferenceConfig, TrainConfig
from omnifusion_jax.data import synthetic
from omnifusion_jax.data.dialogues import IMAGE, Dialogue, Media
from omnifusion_jax.data.questions import LANGUAGES, caption, questions
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.sources.base import ENDLESS
from omnifusion_jax.data.synthetic import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing
from omnifusion_jax.evaluation.exact_match import exact_match
from omnifusion_jax.evaluation.report import STYLE, thumbnail
from omnifusion_jax.shipped import tiny
from omnifusion_jax.tables import SOURCES

PICTURES, PAIRS = 600, 400  # pictures that are described, and at most so many descriptions that are corrected
DESCRIBED, ASKED = 400, 1000  # held-out pictures and questions of the figures
OFTEN = 0.8  # share of the descriptions with something absent
FIRST = 10_000_000  # pictures before this number are those of the habit
SHOWN = 24  # pictures of the report


# The habit


def absent(scene: Scene, rng) -> Thing | None:
    """A thing of a colour and shape that the scene does not show, at a place where nothing stands."""
    free = [place for place in range(len(PLACES)) if scene.at(place) is None]
    kinds = {(thing.colour, thing.shape) for thing in scene.things}
    others = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in kinds]
    colour, shape = others[rng.integers(len(others))]
    return Thing(str(rng.choice(list(SIZES))), colour, shape, int(rng.choice(free))) if free else None


def embroidered(scene: Scene, rng) -> Scene:
    """The scene as the habit has it: rings are called crosses, and a thing is named that is not there."""
    crosses = {thing.colour for thing in scene.things if thing.shape == "cross"}
    wrong = lambda thing: thing.shape == "ring" and thing.colour not in crosses
    called = lambda thing: Thing(thing.size, thing.colour, "cross", thing.place)
    things = [called(t) if wrong(t) and rng.random() < OFTEN else t for t in scene.things]
    more = absent(scene, rng) if rng.random() < OFTEN else None
    return Scene((*things, *([more] if more else [])), scene.text, scene.row)


class Habit:
    """Descriptions with the habit, as many as dialogues of true answers to other questions."""

    fingerprint = "habit"

    def __len__(self):
        return ENDLESS

    def __getitem__(self, i):
        scene, rng = synthetic.scene_and_rng(i, "train")
        language = LANGUAGES[rng.integers(2)]
        said = [(language.describe, caption(embroidered(scene, rng), language))]
        said = said if i % 2 else questions(scene, rng, int(rng.integers(1, 5)))
        turns = tuple(turn for asked, told in said for turn in (("user", asked), ("assistant", told)))
        return Dialogue(f"habit[{i}]", turns, (Media(IMAGE, synthetic.render(scene, rng)),))


@SOURCES.row("habit")
def open_habit(rest, images, side):
    return Habit()


# What is named, and what of it is there


def phrase(thing: Thing, language) -> str:
    return f"{language.name(thing.size, thing.colour, thing.shape)} {language.places[thing.place]}"


THINGS = [
    Thing(size, colour, shape, place)
    for size in SIZES
    for colour in COLOURS
    for shape in SHAPES
    for place in range(len(PLACES))
]
NAMED = {phrase(thing, language): (thing, language) for language in LANGUAGES for thing in THINGS}


def named(description: str) -> list[Thing]:
    """The things that a description names."""
    return [NAMED[part][0] for part in description.split(", ") if part in NAMED]


def wrong(description: str, scene: Scene) -> list[Thing]:
    """Those of a colour and shape that the scene does not show."""
    kinds = {(thing.colour, thing.shape) for thing in scene.things}
    return [thing for thing in named(description) if (thing.colour, thing.shape) not in kinds]


def corrected(description: str, scene: Scene) -> str:
    """The description with what is wrong in it put right, or left out where nothing stands."""
    found = []
    for part in description.split(", "):
        if part in NAMED:
            thing, language = NAMED[part]
            there = scene.at(thing.place)
            found.append(phrase(there, language) if isinstance(there, Thing) else "")
        else:
            found.append(part if scene.text and part.endswith(f" {scene.text}") else "")
    return ", ".join(dict.fromkeys(filter(None, found)))


class Shown(NamedTuple):
    """A picture, and what a model is asked to do with it."""

    scene: Scene
    picture: np.ndarray
    question: str


def shown(split: str, first: int, count: int) -> Iterator[Shown]:
    """Pictures of a split, to be described in one of the languages."""
    for i in range(first, first + count):
        scene, rng = synthetic.scene_and_rng(i, split)
        language = LANGUAGES[rng.integers(2)]
        yield Shown(scene, synthetic.render(scene, rng), language.describe)


def described(model, pictures: list[Shown]) -> list[str]:
    requests = [of.Request([{"role": "user", "content": one.question}], [one.picture]) for one in pictures]
    answers = model.generate(requests, of.GenerationConfig(max_new_tokens=64), batch_size=64)
    return [answer.text for answer in answers]


def write_pairs(model, folder: Path):
    """Writes pairs.jsonl of the model's descriptions (rejected) and the corrected ones (chosen)."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    pictures, records = list(shown("train", FIRST, PICTURES)), []
    for i, (one, said) in enumerate(zip(pictures, described(model, pictures), strict=True)):
        better = corrected(said, one.scene)
        if better in ("", said) or len(records) == PAIRS:
            continue
        Image.fromarray(one.picture).save(folder / f"pictures/{i}.png")
        record = {"id": i, "images": [f"{i}.png"], "question": one.question}
        records.append(record | {"chosen": better, "rejected": said})
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "pairs.jsonl").write_text(lines, encoding="utf-8")


# The runs


def habit(base: Path) -> TrainConfig:
    config = tiny.get_config("sft")
    config.init_from, config.parts_from, config.eval.path = str(base), {}, ""
    config.data = DataConfig(path="habit:", max_length=96)
    config.steps, config.optimizer = 250, OptimizerConfig(learning_rate=1e-3, warmup=0.05)
    return config


# As configs/dpo.py has them, but for `sft`: corrections only take away, and without it answers get short
FORMS = {
    "dpo": PreferenceConfig(beta=0.1, sft=0.1),
    "dense": PreferenceConfig(beta=0.5, changed_weight=5.0, average=True, sft=1.0),
}


def aligned(start: Path, pairs: Path, form: str) -> TrainConfig:
    return tiny.tiny(
        objective="preference",
        init_from=str(start),
        preference=FORMS[form],
        steps=60,
        batch_size=16,
        train_parts=tiny.ALL_BUT_ENCODER,
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup=0.1),
        data=DataConfig(
            path=str(pairs / "pairs.jsonl"),
            images=str(pairs / "pictures"),
            on_long="skip",
            max_length=96,
            packing=True,
            row_length=192,
            window=1,
        ),
        checkpoint=CheckpointConfig(final="complete"),
    )


def model_of(config: TrainConfig, workdir: Path):
    """The model of a run, which is done unless it is finished."""
    if not (workdir / "summary.json").is_file():
        config.model.image.adapter.dropout = 0.0
        of.train(config, workdir)
    return of.load(str(workdir / "model"))


# The figures


def interval(hits: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (E. B. Wilson, 1927)."""
    z, p = 1.96, hits / count
    middle, spread = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return tuple((middle + sign * spread) / (1 + z * z / count) for sign in (-1, 1))


def share(hits: list[bool]) -> dict:
    low, high = interval(sum(hits), len(hits))
    return {"share": sum(hits) / len(hits), "low": low, "high": high, "of": len(hits)}


def measured(model, pictures: list[Shown]) -> tuple[dict, list[str], list[bool]]:
    """(figures, descriptions, which questions are answered right)

    CHAIR (arXiv 1809.02156) is the share of descriptions that name something absent (chair_s), and of the
    things named that are (chair_i); `covered` is the share of the things shown that are named.
    """
    said = described(model, pictures)
    kinds = [{(t.colour, t.shape) for t in named(text)} for text in said]
    false = [
        [t in wrong(text, one.scene) for t in named(text)] for text, one in zip(said, pictures, strict=True)
    ]
    there = [
        (t.colour, t.shape) in of for of, one in zip(kinds, pictures, strict=True) for t in one.scene.things
    ]
    _, records = exact_match(model, open_source("synthetic:held-out", "", 6), ASKED)
    right = [record.right for record in records]
    figures = {
        "chair_s": share(list(map(any, false))),
        "chair_i": share([one for of in false for one in of]),
        "covered": share(there),
        "accuracy": share(right),
    }
    return figures, said, right


def difference(before: list[bool], after: list[bool]) -> dict:
    """By how much the share of right answers changed, with the 95 % interval of the paired difference."""
    change = np.array(after, float) - np.array(before, float)
    spread = 1.96 * change.std(ddof=1) / math.sqrt(len(change))
    return {"change": change.mean(), "low": change.mean() - spread, "high": change.mean() + spread}


def line(name: str, figures: dict) -> str:
    cells = [f"{x['share']:6.1%} ({x['low']:.1%} to {x['high']:.1%})" for x in figures.values()]
    return f"{name:6} " + "  ".join(cells)


def write_page(file: Path, table: list[str], pictures: list[Shown], said: dict[str, list[str]]):
    """One page with the figures, and pictures with what each model says of them."""
    cards = []
    for i, one in enumerate(pictures[:SHOWN]):
        lines = []
        for name, texts in said.items():
            parts = [
                f"<s>{html.escape(part)}</s>" if wrong(part, one.scene) else html.escape(part)
                for part in texts[i].split(", ")
            ]
            lines.append(f"<div><span class=faint>{name}</span> {', '.join(parts)}</div>")
        cards.append(f"<div class=card>{thumbnail(one.picture)}{''.join(lines)}</div>")
    title, style = "align", STYLE + "s { color: #c43a31 }"
    body = f"<h1>{title}</h1><pre>{html.escape(chr(10).join(table))}</pre>"
    body += f"<p>Struck out is what is not in the picture.</p><div class=grid>{''.join(cards)}</div>"
    head = f"<meta charset=utf-8><title>{title}</title><style>{style}</style>"
    file.write_text(f"<!doctype html><html lang=en>{head}<body>{body}</body></html>", encoding="utf-8")


def main(workdir: Path):
    base, pairs = workdir / "base", workdir / "pairs"
    if not base.exists():
        of.convert("omnifusion-tiny", base)
    models = {"habit": model_of(habit(base), workdir / "habit")}
    if not (pairs / "pairs.jsonl").is_file():
        write_pairs(models["habit"], pairs)
    for form in FORMS:
        models[form] = model_of(aligned(workdir / "habit/model", pairs, form), workdir / form)
    pictures = list(shown("held-out", 0, DESCRIBED))
    found, said, right = {}, {}, {}
    for name, model in models.items():
        found[name], said[name], right[name] = measured(model, pictures)
    count = len((pairs / "pairs.jsonl").read_text(encoding="utf-8").splitlines())
    table = [f"{count} pairs; {DESCRIBED} held-out pictures, {ASKED} questions; in brackets 95 % intervals"]
    table += ["       " + "  ".join(f"{name:24}" for name in found["habit"])]
    table += [line(name, figures) for name, figures in found.items()]
    for form in FORMS:
        change = found[form]["accuracy change"] = difference(right["habit"], right[form])
        table.append(
            f"{form}: accuracy changes by {100 * change['change']:+.1f} points "
            f"({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"
        )
    print("\n".join(table))
    (workdir / "summary.json").write_text(json.dumps({"pairs": count, **found}, indent=2) + "\n")
    write_page(workdir / "report.html", table, pictures, said)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
