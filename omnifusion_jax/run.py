"""A training run from its config to a finished model: what the command line `train` does."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp

from omnifusion_jax.checkpoints.load import load_decoder, load_encoder, load_trained
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.checkpoints.storage.placement import placed
from omnifusion_jax.config import HANDED_ON, DecoderConfig, EncoderConfig, part_of, same_settings
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.evaluation.report import write_report
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.models.presets import resolve
from omnifusion_jax.sharding import make_mesh
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training import loop, resume
from omnifusion_jax.training.checkpoint import newest
from omnifusion_jax.training.monitor import read_rows
from omnifusion_jax.training.verdict import verdict
from omnifusion_jax.training.workdir import locked, writing

CHOSEN = (*HANDED_ON, "image_size", "shortest_edge")  # what a model does with an encoder of its own accord
FREE = {
    "adapter": ("dropout", "init"),
    "decoder": ("max_length",),
}  # settings of a part with which the same arrays can go on


def train(config, workdir, allow_change=False, stop=None):
    """Trains as `config` says, or goes on with what is in `workdir`, and writes the model, the summary and the report there.

    Args:
      config: a TrainConfig; it is not changed. A preset whose name was changed in it is followed.
      allow_change: go on although settings that change the meaning of the run differ from those it was begun with; they are printed.
      stop: a training.signals.Stop that may end the run, or None.
    Returns: the figures of summary.json. "problems", where there are any, is a list of sentences: the model is written, but nothing was learned.
    Raises: OmniFusionError, and Stopped.
    """
    config = copy.deepcopy(config)
    config.model = resolve(config.model)
    config.validate()
    workdir, objective = Path(workdir).absolute(), OBJECTIVES[config.objective]
    with locked(workdir):
        resume.compare(config, workdir, newest(workdir / "checkpoints"), allow_change)
        given, tokenizer_dir = starting_point(config, allow_change)
        tokenizer = tokenizer_dir and Tokenizer(tokenizer_dir).for_vocabulary(config.model.decoder.vocab)
        batches, evaluate = objective.batches(config, tokenizer), objective.evaluator(config, tokenizer)
        on_eval = evaluate and (lambda arrays: named(evaluate(arrays)[0]))
        try:
            trained, frozen = loop.train(config, workdir, batches, given, on_eval, allow_change, stop)
        finally:
            batches.close()
        with writing(workdir):
            save_model(config, workdir / "model", trained, frozen, tokenizer_dir)
        figures, records = evaluate({**trained, **frozen}) if evaluate else ({}, [])
        figures = named(figures) | {"steps": config.steps, "data/skipped": batches.skipped}
        if problems := verdict(read_rows(workdir / "metrics.jsonl"), objective.ignorance(config, tokenizer)):
            figures["problems"] = problems
        with writing(workdir):
            (workdir / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
            write_report(workdir, records, earlier=config.init_from and Path(config.init_from).parent)
    for line in batches.left_out():
        print(line)
    return figures


def starting_point(config, allow_change=False):
    """The parameters that the run starts from, by path, and the tokenizer's directory."""
    arrays, tokenizer, mesh = (
        {},
        config.tokenizer and Path(locate(config.tokenizer)),
        make_mesh(**vars(config.mesh)),
    )
    ours = config.model.parts
    for part, source in config.parts_from.items():
        if isinstance(ours.get(part), EncoderConfig):
            stored, found = load_encoder(source, part)
            same_settings(
                f"model.{dotted(part)}", with_grid(ours[part]), with_grid(stored), source, but=CHOSEN
            )
        elif part == "decoder":
            stored, found, words = load_decoder(source)
            same_settings("model.decoder", ours[part], stored, source, but=FREE["decoder"])
            tokenizer = tokenizer or words
        else:
            known = [name for name, c in ours.items() if isinstance(c, EncoderConfig | DecoderConfig)]
            raise ConfigError(
                f"parts_from names {part!r}; a part that comes from a checkpoint of its own is one of {', '.join(known)}"
            )
        arrays |= placed(mesh, found)
    if config.init_from:
        stored, trained, found = load_trained(config.init_from, config.model)
        theirs = stored.parts
        for part in dict.fromkeys([*ours, *theirs]):
            if part != "special":
                free = FREE.get(part.rpartition("/")[2], ())
                same_settings(
                    f"model.{dotted(part)}", ours.get(part), theirs.get(part), config.init_from, but=free
                )
        resume.same_reading(config.model, stored, config.init_from, allow_change)
        arrays |= placed(mesh, trained)
        tokenizer = tokenizer or found
    if tokenizer is None and OBJECTIVES[config.objective].text:
        raise ConfigError(
            "no tokenizer: set parts_from.decoder, init_from or tokenizer (a directory with tokenizer.json)"
        )
    return arrays, tokenizer


def dotted(part):
    """A part as flags name its config: image/encoders/0 is image.encoders.0."""
    return part.replace("/", ".")


def with_grid(c):
    """An encoder's config that names its grid of positions: weights fit by it, whatever the size of pictures."""
    return c and dataclasses.replace(c, position_grid=c.grid)


def named(figures):
    return {f"eval/{name}": value for name, value in figures.items()}


def save_model(config, directory, trained, frozen, tokenizer_dir):
    """The finished model: what was trained, in float32, or the complete model in the type it computes in."""
    complete = config.checkpoint.final == "complete"
    arrays = cast({**trained, **frozen}, jnp.dtype(config.compute_dtype)) if complete else trained
    arrays = {
        path: a for path, a in arrays.items() if part_of(path) in config.model.parts
    }  # a head that only the objective has is none
    beside = directory.with_name("model.new")
    shutil.rmtree(beside, ignore_errors=True)
    save_native(beside, config.model, arrays, tokenizer_dir)
    shutil.rmtree(directory, ignore_errors=True)  # of an earlier, shorter run in the same place
    beside.rename(directory)
