"""Writes any source as a data set of TensorFlow Datasets, by its own pieces that need no TensorFlow.

Its builders would not do: beyond a gigabyte they sort examples in files that TensorFlow writes.
"""

import collections
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from omnifusion_jax.data.dialogues import FORMS, IMAGE, Dialogue
from omnifusion_jax.data.prepared.disk import locked, writing
from omnifusion_jax.data.prepared.plan import Plan, whole
from omnifusion_jax.data.prepared.shards import PORTION, Report, refuse
from omnifusion_jax.data.sources.base import Source
from omnifusion_jax.data.sources.tfds import SPLIT, installed
from omnifusion_jax.errors import DataError

VERSION = "1.0.0"


def write_tfds(
    source: Source,
    output: Path,
    plan: Plan,
    name: str,
    *,
    skip: bool,
    advance: Callable[[int], Any] = lambda records: None,
) -> dict:
    """Writes OUTPUT/NAME/1.0.0, in the order of the source, and returns what is in it.

    `skip`, `advance` and errors are those of `prepare_files`. What was cut off begins anew.
    """
    tfds = installed()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(f"--name={name}: a name is made of small letters, digits and _")
    folder, beside = output / name / VERSION, output / name / f"incomplete.{VERSION}"
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent):
        if folder.exists():
            raise DataError(f"{folder} is there already: give another --output or --name")
        shutil.rmtree(beside, ignore_errors=True)
        report = Report(file=str(folder))
        with writing(beside):
            beside.mkdir()
            written = tfds.core.SequentialWriter(
                information(tfds, name, beside), plan.shard_records, file_format="array_record"
            )
            written.initialize_splits([SPLIT])
        for start in range(0, plan.records, PORTION):
            portion = range(start, min(start + PORTION, plan.records))
            examples = list(read(source, portion, plan, report))
            refuse(report, skip)
            with writing(beside):
                written.add_examples({SPLIT: examples})
            advance(len(portion))
        if not report.records:
            first = report.skipped[0]
            raise DataError(
                f"{folder}: no record can be used. The first: {first['problem']}", first["reason"]
            )
        with writing(folder):
            written.close_all()
            beside.replace(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    skipped = dict(collections.Counter(row["reason"] for row in report.skipped))
    return {"records": report.records, "media": report.media, "bytes": size, "skipped": skipped}


def information(tfds, name: str, folder: Path):
    """The DatasetInfo of dialogues: both forms of turns are there, and one of them is empty in an example."""
    kinds = tfds.features
    features = {"id": kinds.Text(), "images": kinds.Sequence(kinds.Image()), "parted": np.bool_}
    features |= {form: kinds.Sequence(dict.fromkeys(keys, kinds.Text())) for form, *keys in FORMS}
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
    )
    return tfds.core.DatasetInfo(
        builder=identity,
        description="Dialogues about pictures",
        features=kinds.FeaturesDict(features),
        disable_shuffling=True,
    )


def read(source, portion, plan, report):
    """Yields the examples of records, and notes in the report what is and what is left out."""
    for i in portion:
        try:
            dialogue = whole(source[i], plan.max_pixels)
            yield example(dialogue)
        except DataError as error:
            report.skip(i, error)
        else:
            report.add(i, dialogue)


def example(dialogue: Dialogue) -> dict:
    if other := {media.stream for media in dialogue.media} - {IMAGE}:
        raise DataError(
            f"{dialogue.where}: media of {', '.join(other)}, only pictures are written here", "media"
        )
    if dialogue.rejected is not None:
        raise DataError(
            f"{dialogue.where}: two answers to compare, and only dialogues are written here. "
            "Write array_record files",
            "form",
        )
    used = FORMS[0] if dialogue.marked else FORMS[1]
    turns = {form: {key: [] for key in keys} for form, *keys in FORMS}
    for key, column in zip(used[1:], zip(*dialogue.turns, strict=True), strict=True):
        turns[used[0]][key] = list(column)
    name = dialogue.where.encode(errors="backslashreplace").decode()
    return {"id": name, "images": list(dialogue.images), "parted": dialogue.parted, **turns}
