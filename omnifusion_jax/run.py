"""A training run from its config to a finished model: what the command line `train` does."""

import contextlib
import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp

from omnifusion_jax import hosts
from omnifusion_jax.checkpoints import integers
from omnifusion_jax.checkpoints.load import (
    NO_TOKENIZER,
    load_decoder,
    load_encoder,
    load_factors,
    load_trained,
)
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.checkpoints.storage.placement import placed
from omnifusion_jax.config import (
    HANDED_ON,
    DecoderConfig,
    EncoderConfig,
    TrainConfig,
    check,
    of_encoders,
    part_of,
    same_settings,
    to_json,
)
from omnifusion_jax.data import pipeline
from omnifusion_jax.data.mixture import open_mixture
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.evaluation.report import write_report
from omnifusion_jax.models import lora
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.models.presets import resolve
from omnifusion_jax.paths import located, remote, removed
from omnifusion_jax.sharding import make_mesh, owners, shares
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training import loop, resume
from omnifusion_jax.training.checkpoint import newest, restore_params, steps
from omnifusion_jax.training.evaluating import Evaluations
from omnifusion_jax.training.features import encoder_arrays, same_features
from omnifusion_jax.training.lines import read_rows
from omnifusion_jax.training.profile import Span
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
    config: TrainConfig,
    workdir: str | Path,
    allow_change: bool = False,
    stop: Stop | None = None,
    profile: str | None = None,
) -> dict:
    """Trains as `config` says, and writes the model, the summary and the report to `workdir`.

    A run that was begun in `workdir` is resumed. With several hosts (hosts.started) all of them call this;
    the first writes. With `checkpoint.keep_best` the model of the best step is written too.

    Args:
      config: not changed. If its preset was changed by name, the new preset is used.
      allow_change: resume although settings that change what the run means are not those it was begun with;
        they are printed.
      stop: may end the run early.
      profile: steps that are traced into WORKDIR/profile, such as "10:20".
    Returns: the figures of summary.json. "problems", if present, is a list of sentences: the model is
      written, but nothing was learned.
    Raises: OmniFusionError, and Stopped.
    """
    config, workdir = completed(config), located(workdir)
    objective = OBJECTIVES[config.objective]
    span = profile and Span.read(profile).inside(config.steps)
    with locked(workdir) if hosts.first() else contextlib.nullcontext():
        same_start(config, workdir)
        hosts.by_first(lambda: resume.compare(config, workdir, newest(workdir / "checkpoints"), allow_change))
        if objective.text:  # weights may be hours of downloading: before them it is known that data are there
            open_mixture(config.data, config.model.image.encoders[0].side)
        start, tokenizer_dir = starting_point(config, allow_change)
        tokenizer = tokenizer_dir and Tokenizer(tokenizer_dir).for_vocabulary(config.model.decoder.vocab)
        objective.begin(config, tokenizer, lambda: whole(config, start))
        batches = objective.batches(config, tokenizer)
        try:
            given, encoders = parted(config, start, getattr(batches, "features", None))
            evaluations = Evaluations(evaluator(config, tokenizer, encoders), config)
            trained, frozen = loop.train(
                config, workdir, batches, given, evaluations, allow_change, stop, span
            )
        finally:
            batches.close()
        with writing(workdir):
            save_model(config, workdir / "model", trained, frozen, tokenizer_dir, encoders)
        counted = hosts.gather(batches.counts())
        apart = owners(shares(make_mesh(**vars(config.mesh)), config.batch_size))
        counts = pipeline.counted([counted[i] for i in apart])
        best = evaluations.best(steps(workdir / "checkpoints"))
        figures = evaluations.figures | {"steps": config.steps}
        figures |= {f"data/{name}": n for name, n in counts.items()}
        if best is not None:
            figures |= {"best/step": best, f"best/{config.checkpoint.keep_best}": evaluations.found[best]}

        def finish():
            problems = verdict(read_rows(workdir / "metrics.jsonl"), objective.ignorance(config, tokenizer))
            found = figures | ({"problems": problems} if problems else {})
            with writing(workdir):
                (workdir / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
                earlier = config.init_from and located(config.init_from).parent
                write_report(workdir, evaluations.records, earlier=earlier)
            return found

        figures = hosts.by_first(finish)
        if best is not None:
            if best < config.steps:
                trained = restore_params(workdir / "checkpoints" / str(best), trained)
            with writing(workdir):
                save_model(config, workdir / "best", trained, frozen, tokenizer_dir, encoders)
    for line in batches.left_out():
        print(line)
    return figures


def evaluator(config: TrainConfig, tokenizer, encoders: Callable[[], dict] = dict):
    """That of the objective, which is given the plain model: factors merged, kernels no integers any more.

    `encoders` reads what training does without, see `parted`.
    """
    evaluate = OBJECTIVES[config.objective].evaluator(config, tokenizer)
    if evaluate is None:
        return None
    dtype = jnp.dtype(config.compute_dtype)
    return lambda arrays: evaluate({**encoders(), **lora.merged(arrays, config.lora, dtype)})


def same_start(config: TrainConfig, workdir: Path):
    """Compares what the hosts were started with; the first has its workdir by then.

    Raises: ConfigError when a host has another config, or does not see the workdir of the first.
    """
    digest = hashlib.sha256(to_json(config).encode()).hexdigest()
    started = hosts.gather([digest, str(workdir)])
    seen = hosts.gather((workdir / "lock").exists())
    for i in range(hosts.count()):
        if started[i] != started[0]:
            raise ConfigError(
                f"{hosts.name(i)} was started with another config or --workdir than {hosts.name(0)}. "
                "Start the same command on all hosts"
            )
        if not seen[i]:
            raise ConfigError(
                f"{hosts.name(i)} does not see the {workdir} of {hosts.name(0)}. "
                "Give a --workdir that all hosts share"
            )


def replay(config: TrainConfig, workdir: str | Path, step: int, allow_change: bool = False) -> Replay:
    """Runs a step of the run in `workdir` again, and says what each of its examples did.

    Nothing in `workdir` is changed. Arguments and errors as in `train`.
    """
    config, workdir = completed(config), located(workdir)
    check(hosts.count() == 1, "--replay looks at a step on one host: start it on one alone")
    check((workdir / "config.json").is_file(), f"{workdir} holds no run: there is no step to replay")
    config.data.check = "off"  # of the data, before a run
    resume.compare(config, workdir, newest(workdir / "checkpoints"), allow_change)
    start, tokenizer_dir = starting_point(config, allow_change)
    tokenizer = tokenizer_dir and Tokenizer(tokenizer_dir).for_vocabulary(config.model.decoder.vocab)
    with contextlib.closing(OBJECTIVES[config.objective].batches(config, tokenizer)) as batches:
        given, _ = parted(config, start, getattr(batches, "features", None))
        return run_again(config, workdir, step, batches, given, allow_change)


def completed(config: TrainConfig) -> TrainConfig:
    """A checked copy of a config, with a preset that was changed by name taken over."""
    config = copy.deepcopy(config)
    config.model = resolve(config.model)
    return config.validate()


def starting_point(config: TrainConfig, allow_change: bool = False) -> tuple[dict[str, Lazy], Path | None]:
    """What a run starts from: ({path: parameter, not yet read}, the tokenizer's directory or None).

    Raises: ConfigError when a checkpoint does not fit the config, or when the tokenizer is missing.
    """
    arrays = {}
    tokenizer = config.tokenizer and Path(locate(config.tokenizer))
    ours = config.model.parts
    for part, source in config.parts_from.items():
        if isinstance(ours.get(part), EncoderConfig):
            stored, found = load_encoder(source, part)
            same_settings(
                f"model.{dotted(part)}", with_grid(ours[part]), with_grid(stored), source, but=CHOSEN
            )
        elif part == "decoder":
            stored, found, words = load_decoder(source)
            found = integers.plain(found)
            same_settings("model.decoder", ours[part], stored, source, but=FREE["decoder"])
            tokenizer = tokenizer or words
        else:
            known = [name for name, c in ours.items() if isinstance(c, EncoderConfig | DecoderConfig)]
            raise ConfigError(
                f"parts_from names {part!r}; "
                f"a part that comes from a checkpoint of its own is one of {', '.join(known)}"
            )
        arrays |= found
    if config.init_from:
        stored, trained, found = load_trained(config.init_from, config.model)
        theirs = stored.parts
        for part in dict.fromkeys([*ours, *theirs]):
            if part == "special":
                continue
            name, free = f"model.{dotted(part)}", FREE.get(part.rpartition("/")[2], ())
            same_settings(name, ours.get(part), theirs.get(part), config.init_from, but=free)
        if factors := load_factors(config.init_from):
            same_settings("lora", config.lora, factors, config.init_from, but=("base", "dropout"))
        resume.same_reading(config.model, stored, config.init_from, allow_change)
        arrays |= trained
        tokenizer = tokenizer or found
    if tokenizer is None and OBJECTIVES[config.objective].text:
        raise ConfigError(NO_TOKENIZER)
    return arrays, tokenizer


def parted(config: TrainConfig, start: dict, made: dict | None) -> tuple[dict, Callable[[], dict]]:
    """What training starts from, on the devices, and a function that reads the encoders it does without.

    Args:
      start: the parameters that `starting_point` gives.
      made: what made features of the media, as data.features has it. None: media are what they are, and
        training does without none.
    Raises: ConfigError when the features are not what the config's encoders would give.
    """
    mesh = make_mesh(**vars(config.mesh))
    if made is None:
        return placed(mesh, start), dict
    same_features(config, start, made)
    others = {path: a for path, a in start.items() if not of_encoders(path, made["streams"])}
    return placed(mesh, others), lambda: placed(mesh, encoder_arrays(config, start))


def whole(config: TrainConfig, start: dict) -> dict:
    """What training starts from, as a plain model on the devices; `start` as `starting_point` gives it."""
    return lora.merged(
        placed(make_mesh(**vars(config.mesh)), start), config.lora, jnp.dtype(config.compute_dtype)
    )


def dotted(part: str) -> str:
    """The path of a part's config in flags: image.encoders.0 for image/encoders/0."""
    return part.replace("/", ".")


def with_grid(c: EncoderConfig | None) -> EncoderConfig | None:
    """The config with its position grid set: weights fit by the grid, whatever the size of pictures."""
    return c and dataclasses.replace(c, position_grid=c.grid)


def save_model(
    config: TrainConfig,
    directory: Path,
    trained: dict,
    frozen: dict,
    tokenizer_dir,
    encoders: Callable[[], dict] = dict,
):
    """Writes a model: the trained parameters in float32, or all of them in the compute dtype.

    Factors are among the trained parameters; in a whole model they are merged. `encoders` reads what training
    did without.
    """
    arrays = trained
    if config.checkpoint.final == "complete":
        dtype = jnp.dtype(config.compute_dtype)
        arrays = {**trained, **frozen, **encoders()}
        arrays = cast(lora.merged(arrays, config.lora, dtype), dtype)
    # a head that only the objective has is no part of the model
    parts = (*config.model.parts, "lora")
    arrays = {path: a for path, a in arrays.items() if part_of(path) in parts}
    beside = directory if remote(directory) else directory.with_name(f"{directory.name}.new")
    hosts.by_first(lambda: removed(beside))
    save_native(beside, config.model, arrays, tokenizer_dir, config.lora)

    def name():
        removed(directory)  # the model of an earlier, shorter run in the same place
        beside.rename(directory)

    if beside != directory:
        hosts.by_first(name)
