"""The real dialogues train to the same losses, bit for bit, from whatever they are stored in."""

import json

import jax
import numpy as np
import pyarrow as pa
import pytest
import tiny
from records import REAL, SHARED, as_arrow, as_parquet, members, needs_real, real, shard

from omnifusion_jax.config import DataConfig, MeshConfig
from omnifusion_jax.data.prepared.folder import prepare_files
from omnifusion_jax.data.prepared.plan import planned
from omnifusion_jax.data.prepared.tfds_files import write_tfds
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.shipped import load
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training import freeze
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.step import init_state, make_step

LENGTH = 224


def as_columns(folder, write, end):
    records, pictures = real()
    held = lambda name: {"bytes": pictures[name], "path": name} if name else None
    write(folder / f"d{end}", pa.Table.from_pylist([r | {"image": held(r.get("image"))} for r in records]))
    return folder / f"d{end}"


def as_lines(folder, _):
    (folder / "d.jsonl").write_text("\n".join(json.dumps(record) for record in real()[0]))
    return folder / "d.jsonl"


def as_tar(folder, _):
    records, pictures = real()
    return shard(folder / "d.tar", members(records, pictures))


def as_files_of_ours(folder, source):
    prepare_files(source, folder / "ours", planned(source, "real", shard_records=10), workers=1, skip=False)
    return folder / "ours"


def as_tfds(folder, source):
    pytest.importorskip("tensorflow_datasets")
    write_tfds(source, folder, planned(source, "real"), "real", skip=False)
    return folder / "real" / "1.0.0"


FORMATS = {
    "lines": as_lines,
    "parquet": lambda folder, _: as_columns(folder, as_parquet, ".parquet"),
    "arrow": lambda folder, _: as_columns(folder, as_arrow, ".arrow"),
    "tar": as_tar,
    "array_record": as_files_of_ours,
    "tfds": as_tfds,
}


@pytest.fixture(scope="module")
def trained():
    """A function from a DataConfig to the losses of three steps; it compiles once."""
    config = load("tiny:real")
    config.batch_size, config.mesh = 2, MeshConfig(data=1, fsdp=1)
    parts = ((r"(image/adapter|special)/.*", 1.0), (r"(image/encoders|decoder)/.*", None))
    tokenizer = Tokenizer(SHARED / "omnifusion_1_1")
    objective, optimizer = OBJECTIVES["answers"], make_optimizer(config.optimizer, 3, parts)
    arrays = {path: jax.numpy.asarray(a) for path, a in tiny.arrays(config.model).items()}
    begun, frozen = freeze.split(parts, arrays)
    settings = {"seed": 0, "grad_accum": 1, "dtype": np.dtype("float32"), "remat": "none"}
    step = jax.jit(make_step(abstract(config.model), objective, optimizer, **settings))

    def losses(path, images=""):
        config.data = DataConfig(path=str(path), images=str(images), max_length=LENGTH, check="off")
        batches, state, found = objective.batches(config, tokenizer), init_state(optimizer, begun), []
        for _ in range(3):
            state, metrics = step(state, frozen, next(batches))
            found.append(float(metrics["loss"]))
        batches.close()
        return found

    return losses


@pytest.fixture(scope="module")
def expected(trained):
    return trained(REAL / "dialogues.json", REAL / "images")


@needs_real
@pytest.mark.parametrize("format", FORMATS)
def test_losses_are_the_same_to_the_bit(trained, expected, tmp_path, format):
    source = open_source(str(REAL / "dialogues.json"), str(REAL / "images"), 6)
    images = REAL / "images" if format == "lines" else ""
    assert trained(FORMATS[format](tmp_path, source), images) == expected
    assert len(set(expected)) == 3 and np.isfinite(expected).all()
