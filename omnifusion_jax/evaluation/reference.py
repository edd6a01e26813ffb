"""Writes the log-likelihoods of pairs of answers under the model that a run starts from, once for all."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from omnifusion_jax import hosts
from omnifusion_jax.batch import Sample, collate
from omnifusion_jax.config import ModelConfig, TrainConfig, check, from_dict, of_encoders
from omnifusion_jax.data.features import unlike
from omnifusion_jax.data.mixture import sets
from omnifusion_jax.data.pipeline import Read
from omnifusion_jax.data.readers import BadSample
from omnifusion_jax.data.reading import Reading
from omnifusion_jax.data.reference import MANIFEST, PART, digest, part_file
from omnifusion_jax.data.sources import ENDLESS
from omnifusion_jax.evaluation.held_out_loss import put
from omnifusion_jax.inference import fingerprint
from omnifusion_jax.inference.prompts import BLANK, bucket
from omnifusion_jax.models.omnifusion import abstract, cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import Choice, using
from omnifusion_jax.sharding import make_mesh, ways
from omnifusion_jax.tables import SOURCES
from omnifusion_jax.training.loss import log_likelihoods
from omnifusion_jax.training.workdir import writing

# Settings of a model that change nothing in what it computes
NAMES = ("preset", "filled_from")
# Settings of the data that say which tokens and pixels a pair has
READING = ("max_length", "draft")
THREADS = 2  # that read pairs, where there are no worker processes


def place(config: TrainConfig) -> Path:
    """The folder of a run's reference. Raises ConfigError when it is not named and there is no default."""
    if config.preference.reference:
        return Path(config.preference.reference)
    kind, colon, rest = config.data.path.partition(":")
    data = Path(rest if colon and kind in SOURCES.names() else config.data.path)
    check(
        bool(config.data.path) and data.exists(),
        "preference.reference is empty, and data.path is no one file or folder to put it beside. "
        "Name a folder for the reference's log-likelihoods",
    )
    return data.with_name(f"{data.name}.reference")


def refer(config: TrainConfig, tokenizer, data: Reading, arrays: Mapping[str, jax.Array], folder: Path):
    """Writes the files of data.reference that are not there yet; what was cut off goes on. All hosts call it.

    Args:
      data: pairs of answers.
      arrays: {path: parameter} of the reference, on the mesh of the run.
    Raises: ConfigError when `arrays` is no whole model, when the folder is of another model, tokenizer,
      layout or data, or when the data has no end.
    """
    check(len(data.source) < ENDLESS, "the data has no end, and a reference reads all of it: give a file")
    made = made_by(config, tokenizer, data, arrays)
    hosts.by_first(lambda: begin(folder, made))
    count = -(-len(data.source) // PART)
    missing = [number for number in range(count) if not part_file(folder, number).is_file()]
    missing = hosts.gather(missing)[0]  # as the first sees them, so that all do the same
    if not missing:
        return
    score, read = Score(config, data, arrays), Read.of(data.source, data.prepare, data.choose)
    with ThreadPoolExecutor(max(THREADS, config.data.num_workers)) as pool:
        for number in missing:
            records = range(number * PART, min((number + 1) * PART, len(data.source)))
            pairs = usable(zip(records, pool.map(read, records), strict=True))
            rows = list(score.rows(pairs))
            hosts.by_first(lambda number=number, rows=rows: write(part_file(folder, number), rows))
            left = len(records) - len(rows)
            lacks = f", {left:,} of the last {len(records):,} are no pairs that can be used" if left else ""
            done = f"{records.stop:,} of {len(data.source):,} records"
            print(f"reference: {done}{lacks}, {folder}", flush=True)


def made_by(config: TrainConfig, tokenizer, data: Reading, arrays: Mapping[str, jax.Array]) -> dict:
    """What log-likelihoods follow from, for JSON; weights as inference.fingerprint has them."""
    needed = nnx.parameters(abstract(config.model))
    missing = [path for path in needed if path not in arrays]
    check(
        not missing,
        f"the reference is the model that the run starts from, and {', '.join(missing[:3])} would be drawn "
        "at random. Give init_from a whole model, or parts_from what it lacks",
    )
    sums = hosts.fetch({path: fingerprint.checksum(arrays[path]) for path in needed})
    found = {
        "weights": fingerprint.digest({path: int(sums[path]) for path in sorted(sums)}),
        "tokenizer": tokenizer.digest,
        "model": settings(config.model),
        "compute_dtype": config.compute_dtype,
        "data": {"content": data.source.fingerprint, "records": len(data.source)},
        "layouts": [[one.name, one.layout, one.prompt] for one in sets(config.data)],
        "reading": {name: getattr(config.data, name) for name in READING},
        "features": data.source.made_by,
    }
    return json.loads(json.dumps(found))


def settings(c: ModelConfig) -> dict:
    """What a model computes, as dicts."""
    return {name: value for name, value in dataclasses.asdict(c).items() if name not in NAMES}


def begin(folder: Path, made: dict):
    """Says in a new folder what its log-likelihoods follow from. Raises ConfigError for one of others."""
    file = folder / MANIFEST
    if file.is_file():
        then = json.loads(file.read_text(encoding="utf-8"))
        # fields that came since had their defaults
        then["model"] = json.loads(json.dumps(settings(from_dict(ModelConfig, then["model"]))))
        differ = unlike(then, made)
        check(
            not differ,
            f"{folder} holds log-likelihoods of another reference than the model that this run starts from: "
            f"{'; '.join(differ)}. Delete it, or name another folder: --config.preference.reference=FOLDER",
        )
        return
    check(
        not any(folder.glob("*.parquet")),
        f"{folder} has Parquet files and no {MANIFEST}: it is no folder of a reference. Name another one, "
        "--config.preference.reference=FOLDER",
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace(file, lambda beside: beside.write_text(json.dumps(made, indent=2), encoding="utf-8"))


def write(file: Path, rows: list[dict]):
    """Writes a file of data.reference; one that is cut off has another name."""
    from pyarrow import Table, float32, int64, list_, parquet, schema, string

    columns = {"record": int64(), "digest": string()}
    columns |= {"chosen": list_(float32()), "rejected": list_(float32())}
    columns |= {"chosen_sum": float32(), "rejected_sum": float32()}
    table = Table.from_pylist(rows, schema(list(columns.items())))
    with writing(file):
        replace(file, lambda beside: parquet.write_table(table, beside))


def replace(file: Path, make: Callable[[Path], object]):
    beside = file.with_name(f"{file.name}.new")
    make(beside)
    beside.rename(file)


def usable(read: Iterator[tuple[int, list[Sample] | BadSample]]) -> Iterator[tuple[int, Sample]]:
    """(index, Sample) of the records that are not bad: the run that follows names and counts those."""
    return ((i, *found) for i, found in read if not isinstance(found, BadSample))


class Score:
    """Runs the reference over pairs, one a row, with as many rows at a time as a step of the run has."""

    def __init__(self, config: TrainConfig, data: Reading, arrays: Mapping[str, jax.Array]):
        self.mesh, self.data = make_mesh(**vars(config.mesh)), data
        self.pools = ways(self.mesh, "batch")
        self.together = config.batch_size // config.grad_accum
        module, made = abstract(config.model), data.source.made_by
        streams = made["streams"] if made else ()
        for stream in streams:
            getattr(module, stream).take_features()
        arrays = {path: a for path, a in arrays.items() if not of_encoders(path, streams)}
        choice = Choice.of(config.attention, self.mesh.devices.flat[0].platform, packed=True)

        @jax.jit
        def run(arrays, batch):
            model = nnx.with_parameters(module, cast(arrays, config.compute_dtype))
            with using(choice):
                return log_likelihoods(model.decoder, model.hidden(batch), batch)

        self.run = lambda batch: run(arrays, batch)

    def rows(self, pairs: Iterator[tuple[int, Sample]]) -> Iterator[dict]:
        """Yields the row of each (index, Sample)."""
        while some := list(itertools.islice(pairs, self.together)):
            samples = [sample for _, sample in some]
            samples += [BLANK] * (self.together - len(samples))
            longest = bucket(max(len(sample.tokens) for sample in samples))
            batch = collate(samples, longest, self.data.prepare.tiles, self.pools, self.data.prepare.room)
            with jax.set_mesh(self.mesh):
                scores = hosts.fetch(self.run(put(batch, self.mesh)))  # [rows, seq]
            for (i, sample), row in zip(some, scores, strict=False):
                yield row_of(i, sample, row)


def row_of(i: int, sample: Sample, scores: np.ndarray) -> dict:
    """The row of record `i`, from log p of each of its tokens, float32[seq]."""
    found = np.where(sample.weights > 0, scores[: len(sample.tokens)], np.nan)
    parts = np.split(found, sample.parts[:1])
    chosen, rejected = (part[~np.isnan(part)] for part in parts)
    sums = {"chosen_sum": chosen.sum(), "rejected_sum": rejected.sum()}
    return {"record": i, "digest": digest(sample), "chosen": chosen, "rejected": rejected, **sums}
