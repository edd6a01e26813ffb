"""Writes a source as a folder that `sources.array_record` reads.

A shard holds the records of one range of the source, so that its bytes depend neither on the number of
workers nor on what was made before. Until all are there, the folder `unfinished` has the plan that they
follow, a report on each that is complete, and the files that are being written.
"""

import collections
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omnifusion_jax.data.features import unlike
from omnifusion_jax.data.prepared.disk import locked, write_json, writing
from omnifusion_jax.data.prepared.features import FeatureShards
from omnifusion_jax.data.prepared.plan import Plan
from omnifusion_jax.data.prepared.shards import HASH, Report, Shards, made, refuse
from omnifusion_jax.data.sources.array_record import (
    FORMAT,
    MANIFEST,
    UNFINISHED,
    VERSION,
    ArrayRecordSource,
    read_manifest,
)
from omnifusion_jax.data.sources.base import Source
from omnifusion_jax.errors import DataError

SKIPPED = "skipped.jsonl"
PLAN = "plan.json"
LISTED = ("file", "records", "bytes")  # of each shard, in dataset.json


def prepare_files(
    source: Source,
    output: Path,
    plan: Plan,
    *,
    workers: int,
    skip: bool,
    advance: Callable[[int], Any] = lambda records: None,
    features: Callable[..., FeatureShards] | None = None,
) -> dict:
    """Writes the shards of a plan that are not there yet, and returns what `dataset.json` then says.

    Args:
      workers: number of processes that read and write.
      skip: whether records that cannot be used are left out, and listed in `skipped.jsonl`.
      advance: is told, from several threads, how many records are done since it was last called.
      features: makes the FeatureShards of (source, plan, output, skip), which write in this process, with
        `workers` threads; None: the media stay what they are.

    Raises:
      DataError: a record cannot be used and `skip` is off, or no record can; or the folder holds something
        else.
      OmniFusionError: the folder cannot be written, or another process writes it.
    """
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        if (output / MANIFEST).exists():
            return finished(output, plan, skip, advance)
        reports = begun(output, plan)
        for shard, report in reports.items():
            refuse(report, skip)
            advance(len(plan.range(shard)))
        left = [shard for shard in range(len(plan)) if shard not in reports]
        try:
            if features is None:
                reports.update(made(Shards(source, plan, output, skip), left, workers, advance))
            else:
                reports.update(features(source, plan, output, skip).made(left, workers, advance))
        finally:
            tidy(output)
        return finish(output, plan, [reports[shard] for shard in range(len(plan))])


def finished(output: Path, plan: Plan, skip: bool, advance: Callable) -> dict:
    """What a folder's `dataset.json` says, if it is that of the plan and its shards are there."""
    same(read_manifest(output)["made_from"], plan, output)
    found = ArrayRecordSource(output).manifest
    if found["skipped"] and not skip:
        raise DataError(
            f"{output} leaves records out, as {SKIPPED} in it lists. They are there for good: "
            "--on_bad_sample=skip takes them so, another --output begins anew"
        )
    with writing(output):
        shutil.rmtree(output / UNFINISHED, ignore_errors=True)
    advance(plan.records)
    return found


def begun(output: Path, plan: Plan) -> dict[int, Report]:
    """{shard: Report} of the shards of a plan that are complete, in a folder that is theirs alone."""
    beside = output / UNFINISHED
    others = {file.name for file in output.iterdir()} - {UNFINISHED}
    if others and (beside / PLAN).exists():
        same(json.loads((beside / PLAN).read_text(encoding="utf-8")), plan, output)
    elif others:
        raise DataError(f"{output} is not empty, and not of prepare_data: give a new folder as --output")
    else:  # the plan of a start that made nothing does not bind this one
        with writing(output):
            beside.mkdir(exist_ok=True)
            write_json(beside / PLAN, dataclasses.asdict(plan), beside=beside)
    tidy(output)
    reports = {}
    for shard in range(len(plan)):
        file, told = output / plan.file(shard), beside / f"{plan.file(shard)}.json"
        if file.exists() and told.exists():
            report = Report(**json.loads(told.read_text(encoding="utf-8")))
            if file.stat().st_size == report.bytes:
                reports[shard] = report
    return reports


def same(before: dict, plan: Plan, output: Path) -> None:
    """Raises DataError, with what differs, if a folder was begun with another plan."""
    now = dataclasses.asdict(plan)
    if bool(before.get("features")) != bool(now["features"]):  # not every setting of the encoders
        before, now = ({**one, "features": bool(one.get("features"))} for one in (before, now))
    differ = unlike(before, now)
    if differ:
        raise DataError(
            f"{output} was made from something else: {'; '.join(differ)}. "
            "Give what it was made from to go on, or another --output"
        )
    if plan.fingerprint is None:
        raise DataError(
            f"{output}: its source has no fingerprint, so that it may have changed unseen. "
            "Remove the folder, or give another --output"
        )


def finish(output: Path, plan: Plan, reports: list[Report]) -> dict:
    """Writes `skipped.jsonl` and `dataset.json`, after which the folder is complete."""
    records, media = sum(report.records for report in reports), collections.Counter()
    skipped = list(itertools.chain.from_iterable(report.skipped for report in reports))
    if not records:
        raise DataError(
            f"{output}: none of the {plan.records} records can be used. The first: {skipped[0]['problem']}",
            skipped[0]["reason"],
        )
    for report in reports:
        media.update(report.media)
    fingerprint = sum(report.hashes for report in reports) % (1 << 8 * HASH)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": f"{fingerprint:0{2 * HASH}x}",
        "records": records,
        "media": dict(sorted(media.items())),
        "bytes": sum(report.bytes for report in reports),
        "skipped": dict(sorted(collections.Counter(row["reason"] for row in skipped).items())),
        "made_from": dataclasses.asdict(plan),
        "shards": [{name: getattr(report, name) for name in LISTED} for report in reports],
    }
    beside = output / UNFINISHED
    with writing(output):
        if skipped:
            write_json(output / SKIPPED, *skipped, beside=beside)
        write_json(output / MANIFEST, manifest, beside=beside, indent=1)
        shutil.rmtree(beside)
    return manifest


def tidy(output: Path) -> None:
    """Removes what was being written when a process ended."""
    for file in (output / UNFINISHED).glob("*.array_record.[0-9]*"):
        file.unlink(missing_ok=True)
