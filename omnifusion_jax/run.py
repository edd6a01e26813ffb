"""A training run from its config to a finished model: what the command line `train` does."""

import contextlib
import copy
import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp

from omnifusion_jax.checkpoints.load import NO_TOKENIZER, load_decoder, load_encoder, load_trained
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.checkpoints.storage.placement import placed
from omnifusion_jax.config import (
    HANDED_ON,
    DecoderConfig,
    EncoderConfig,
    TrainConfig,
    check,
    part_of,
    same_settings,
)
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.evaluation.report import write_report
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.models.presets import resolve
from omnifusion_jax.sharding import make_mesh
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training import loop, resume
from omnifusion_jax.training.checkpoint import newest, restore_params, steps
from omnifusion_jax.training.evaluating import Evaluations
from omnifusion_jax.training.lines import read_rows
from omnifusion_jax.training.replay import Replay
from omnifusion_jax.training.replay import replay as run_again
from omnifusion_jax.training.signals import Stop
from omnifusion_jax.training.verdict import verdict
from omnifusion_jax.training.workdir import locked, writing

# Settings of an encoder that each model chooses for itself
CHOSEN = (*HANDED_ON, "image_size", "shortest_edge")
# Settings of a part that may change while its arrays stay usable
FREE = {"adapter": ("dropout", "init"), "decoder": ("max_length",)}


def train(
    config: TrainConfig, workdir: str | Path, allow_change: bool = False, stop: Stop | None = None
) -> dict:
    """Trains as `config` says, and writes the model, the summary and the report to `workdir`.

    A run that was begun in `workdir` is resumed. With `checkpoint.keep_best` the model of the best step is
    written too.

    Args:
      config: not changed. If its preset was changed by name, the new preset is used.
      allow_change: resume although settings that change what the run means are not those it was begun with;
        they are printed.
      stop: may end the run early.
    Returns: the figures of summary.json. "problems", if present, is a list of sentences: the model is
      written, but nothing was learned.
    Raises: OmniFusionError, and Stopped.
    """
    config, workdir = completed(config), Path(workdir).absolute()
    objective = OBJECTIVES[config.objective]
    with locked(workdir):
        resume.compare(config, workdir, newest(workdir / "checkpoints"), allow_change)
        given, tokenizer_dir = starting_point(config, allow_change)
        tokenizer = tokenizer_dir and Tokenizer(tokenizer_dir).for_vocabulary(config.model.decoder.vocab)
        batches = objective.batches(config, tokenizer)
        try:
            evaluations = Evaluations(objective.evaluator(config, tokenizer), config)
            trained, frozen = loop.train(config, workdir, batches, given, evaluations, allow_change, stop)
        finally:
            batches.close()
        with writing(workdir):
            save_model(config, workdir / "model", trained, frozen, tokenizer_dir)
        counts = {f"data/{name}": count for name, count in batches.counts().items()}
        best = evaluations.best(steps(workdir / "checkpoints"))
        figures = evaluations.figures | {"steps": config.steps} | counts
        if best is not None:
            figures |= {"best/step": best, f"best/{config.checkpoint.keep_best}": evaluations.found[best]}
        problems = verdict(read_rows(workdir / "metrics.jsonl"), objective.ignorance(config, tokenizer))
        if problems:
            figures["problems"] = problems
        with writing(workdir):
            (workdir / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
            earlier = config.init_from and Path(config.init_from).parent
            write_report(workdir, evaluations.records, earlier=earlier)
            if best is not None:
                if best < config.steps:
                    trained = restore_params(workdir / "checkpoints" / str(best), trained)
                save_model(config, workdir / "best", trained, frozen, tokenizer_dir)
    for line in batches.left_out():
        print(line)
    return figures


def replay(config: TrainConfig, workdir: str | Path, step: int, allow_change: bool = False) -> Replay:
    """Runs a step of the run in `workdir` again, and says what each of its examples did.

    Nothing in `workdir` is changed. Arguments and errors as in `train`.
    """
    config, workdir = completed(config), Path(workdir).absolute()
    check((workdir / "config.json").is_file(), f"{workdir} holds no run: there is no step to replay")
    config.data.check = "off"  # of the data, before a run
    resume.compare(config, workdir, newest(workdir / "checkpoints"), allow_change)
    given, tokenizer_dir = starting_point(config, allow_change)
    tokenizer = tokenizer_dir and Tokenizer(tokenizer_dir).for_vocabulary(config.model.decoder.vocab)
    with contextlib.closing(OBJECTIVES[config.objective].batches(config, tokenizer)) as batches:
        return run_again(config, workdir, step, batches, given, allow_change)


def completed(config: TrainConfig) -> TrainConfig:
    """A checked copy of a config, with a preset that was changed by name taken over."""
    config = copy.deepcopy(config)
    config.model = resolve(config.model)
    return config.validate()


def starting_point(config: TrainConfig, allow_change: bool = False):
    """What a run starts from: ({path: parameter}, the tokenizer's directory or None).

    Raises: ConfigError when a checkpoint does not fit the config, or when the tokenizer is missing.
    """
    arrays = {}
    tokenizer = config.tokenizer and Path(locate(config.tokenizer))
    mesh = make_mesh(**vars(config.mesh))
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
                f"parts_from names {part!r}; "
                f"a part that comes from a checkpoint of its own is one of {', '.join(known)}"
            )
        arrays |= placed(mesh, found)
    if config.init_from:
        stored, trained, found = load_trained(config.init_from, config.model)
        theirs = stored.parts
        for part in dict.fromkeys([*ours, *theirs]):
            if part == "special":
                continue
            name, free = f"model.{dotted(part)}", FREE.get(part.rpartition("/")[2], ())
            same_settings(name, ours.get(part), theirs.get(part), config.init_from, but=free)
        resume.same_reading(config.model, stored, config.init_from, allow_change)
        arrays |= placed(mesh, trained)
        tokenizer = tokenizer or found
    if tokenizer is None and OBJECTIVES[config.objective].text:
        raise ConfigError(NO_TOKENIZER)
    return arrays, tokenizer


def dotted(part: str) -> str:
    """The path of a part's config in flags: image.encoders.0 for image/encoders/0."""
    return part.replace("/", ".")


def with_grid(c: EncoderConfig | None) -> EncoderConfig | None:
    """The config with its position grid set: weights fit by the grid, whatever the size of pictures."""
    return c and dataclasses.replace(c, position_grid=c.grid)


def save_model(config: TrainConfig, directory: Path, trained: dict, frozen: dict, tokenizer_dir):
    """Writes a model: the trained parameters in float32, or all of them in the compute dtype."""
    arrays = trained
    if config.checkpoint.final == "complete":
        arrays = cast({**trained, **frozen}, jnp.dtype(config.compute_dtype))
    # a head that only the objective has is no part of the model
    arrays = {path: a for path, a in arrays.items() if part_of(path) in config.model.parts}
    beside = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    save_native(beside, config.model, arrays, tokenizer_dir)
    shutil.rmtree(directory, ignore_errors=True)  # the model of an earlier, shorter run in the same place
    beside.rename(directory)
