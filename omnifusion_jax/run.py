"""A training run from its config to a finished model: what the command line `train` does."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp

from omnifusion_jax.checkpoints.bundled import locate
from omnifusion_jax.checkpoints.lazy import placed
from omnifusion_jax.checkpoints.load import load_decoder, load_encoder, load_trained
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.config import HANDED_ON, ConfigError, same_settings
from omnifusion_jax.data.check import start_check
from omnifusion_jax.data.describe import describe
from omnifusion_jax.data.layout import Layout, Prepare
from omnifusion_jax.data.pictures import Lens
from omnifusion_jax.data.pipeline import Batches, PatchSource, keep
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.synthetic import CELL_WORDS
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.evaluation.exact_match import exact_match
from omnifusion_jax.evaluation.patches import patch_accuracy
from omnifusion_jax.evaluation.report import write_report
from omnifusion_jax.inference.model import Model
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.sharding import make_mesh
from omnifusion_jax.training import resume
from omnifusion_jax.training.checkpoint import newest
from omnifusion_jax.training.loop import train
from omnifusion_jax.training.monitor import read_rows
from omnifusion_jax.training.verdict import verdict
from omnifusion_jax.training.workdir import locked, writing

CHOSEN = (*HANDED_ON, "image_size", "shortest_edge")  # what a model does with an encoder of its own accord


def run(config, workdir, allow_change=False, stop=None):
    """Trains as `config` says, or goes on with what is in `workdir`, and writes the model, the summary and the report there.

    Args:
      config: a TrainConfig, resolved and validated.
      allow_change: go on although settings that change the meaning of the run differ from those it was begun with; they are printed.
      stop: a training.signals.Stop that may end the run, or None.
    Returns: the figures of summary.json. "problems", where there are any, is a list of sentences: the model is written, but nothing was learned.
    Raises: OmniFusionError, and Stopped.
    """
    workdir = Path(workdir).absolute()
    with locked(workdir):
        resume.compare(config, workdir, newest(workdir / "checkpoints"), allow_change)
        given, tokenizer_dir = starting_point(config, allow_change)
        tokenizer = tokenizer_dir and Tokenizer(tokenizer_dir).fits(config.model.decoder.vocab)
        batches, evaluate = make_batches(config, tokenizer), evaluator(config, tokenizer)
        on_eval = evaluate and (lambda arrays: evaluate(arrays)[0])
        try:
            trained, frozen = train(config, workdir, batches, given, on_eval, allow_change, stop)
        finally:
            batches.close()
        with writing(workdir):
            save_model(config, workdir / "model", trained, frozen, tokenizer_dir)
        figures, records = evaluate({**trained, **frozen}) if evaluate else ({}, [])
        figures |= {"steps": config.steps, "data/skipped": batches.skipped}
        if problems := verdict(read_rows(workdir / "metrics.jsonl"), unknowing(config, tokenizer)):
            figures["problems"] = problems
        with writing(workdir):
            (workdir / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
            write_report(workdir, records, earlier=config.init_from and Path(config.init_from).parent)
    for line in batches.left_out():
        print(line)
    return figures


def unknowing(config, tokenizer):
    """The loss of a model that knows nothing, and takes every word for equally likely."""
    return math.log(len(CELL_WORDS) if config.objective == "patches" else tokenizer.vocab)


def starting_point(config, allow_change=False):
    """The parameters that the run starts from, by path, and the tokenizer's directory."""
    arrays, tokenizer, mesh = {}, config.tokenizer and Path(locate(config.tokenizer)), make_mesh(**vars(config.mesh))
    for i, (name, source) in enumerate({"encoder": config.encoder_from, "encoder2": config.encoder2_from}.items()):
        if source:
            stored, encoder = load_encoder(source, i)
            same_settings(f"model.{name}", with_grid(getattr(config.model, name)), with_grid(stored), source, but=CHOSEN)
            arrays |= placed(mesh, encoder)
    if config.decoder_from:
        stored, decoder, found = load_decoder(config.decoder_from)
        same_settings("model.decoder", config.model.decoder, stored, config.decoder_from, but=("max_length",))
        arrays, tokenizer = arrays | placed(mesh, decoder), tokenizer or found
    if config.init_from:
        stored, trained, found = load_trained(config.init_from, config.model)
        for part, free in (("encoder", ()), ("encoder2", ()), ("adapter", ("dropout", "init")), ("decoder", ("max_length",))):
            same_settings(f"model.{part}", getattr(config.model, part), getattr(stored, part), config.init_from, but=free)
        resume.same_reading(config.model, stored, config.init_from, allow_change)
        arrays |= placed(mesh, trained)
        tokenizer = tokenizer or found
    if tokenizer is None and config.objective == "answers":
        raise ConfigError("no tokenizer: set decoder_from, init_from or tokenizer (a directory with tokenizer.json)")
    return arrays, tokenizer


def with_grid(c):
    """An encoder's config that names its grid of positions: weights fit by it, whatever the size of pictures."""
    return c and dataclasses.replace(c, position_grid=c.grid)


def make_batches(config, tokenizer):
    """What the run learns from."""
    c, side, lens = config.data, config.model.encoder.side, Lens(config.model, config.data.max_pixels)
    settings = {"batch_size": config.batch_size, "sizes": lens.sizes, "seed": config.seed, "shuffle": c.shuffle, "num_workers": c.num_workers}
    if config.objective == "patches":
        return Batches(PatchSource(side), keep, length=side * side, **settings)
    source = open_source(c.path, c.images, side)
    prepare = Prepare(Layout(tokenizer, config.model, c.max_length), lens)
    print(describe(source, prepare, tokenizer))
    print(f"The loss of a model that knows nothing is ln {tokenizer.vocab} = {unknowing(config, tokenizer):.1f}.")
    settings |= {"on_bad_sample": c.on_bad_sample, "bad_share": c.bad_share}
    check = functools.partial(start_check, source, prepare, c.num_workers) if c.check == "first_epoch" else None
    return Batches(source, prepare, length=c.max_length, tiles=lens.room, check=check, **settings)


def evaluator(config, tokenizer):
    """A function from arrays to (figures by name, records to show), or None."""
    c = config.eval
    if config.objective == "patches":
        return c.count and (lambda arrays: (named(patch_accuracy(config.model, arrays, c.count)), []))
    if not c.path:
        return None
    source = open_source(c.path, c.images, config.model.encoder.side)

    def evaluate(arrays):
        model = Model(config.model, arrays, tokenizer, dtype=config.compute_dtype)
        figures, records = exact_match(model, source, c.count, batch_size=c.batch_size, max_new_tokens=c.max_new_tokens, blind=c.blind)
        return named(figures), records

    return evaluate


def named(figures):
    return {f"eval/{name}": value for name, value in figures.items()}


def save_model(config, directory, trained, frozen, tokenizer_dir):
    """The finished model: what was trained, in float32, or the complete model in the type it computes in."""
    complete = config.checkpoint.final == "complete"
    arrays = cast({**trained, **frozen}, jnp.dtype(config.compute_dtype)) if complete else trained
    arrays = {path: a for path, a in arrays.items() if path != "head"}  # a bare encoder's reading head is not part of a model
    beside = directory.with_name("model.new")
    shutil.rmtree(beside, ignore_errors=True)
    save_native(beside, config.model, arrays, tokenizer_dir)
    shutil.rmtree(directory, ignore_errors=True)  # of an earlier, shorter run in the same place
    beside.rename(directory)
