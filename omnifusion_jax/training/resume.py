"""Checks that a resumed run has the config and the data that it was begun with."""

import dataclasses
import importlib.metadata
import json
import re
import shlex
from pathlib import Path

from omnifusion_jax.config import ModelConfig, StreamConfig, TrainConfig, to_json
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.training.workdir import writing

ABSENT = "(no such field)"

# Fields that may change when a run is resumed, and why. Every other field, new ones included, changes what
# the run means.
FREE = (
    r"mesh\..*",  # where arrays lie: the same results, to rounding
    r"spread_sequence",  # where activations lie
    r"remat",  # what is kept or computed again: the same values
    r"attention",  # which kernel computes it: the same results, to rounding
    r"checkpoint\..*",  # how often the state is saved, and in what form the model is written at the end
    r"eval\..*",  # only measures
    r"log_every|wandb",  # what is written down, and where
    r"preference\.reference",  # where it is kept
    r"max_bad_steps",  # when to give up
    r"data\.num_workers",  # which processes read, not what is read
    r"data\.check",  # what is checked beforehand
    r"data\.(on_bad_sample|bad_share)",  # what an error advises to change; good samples keep their order
)


def differences(then, now, default=None, path=""):
    """Compares two configs, given as nested dicts: [(field, value then, value now)].

    A field that `then` lacks had its value in `default`.
    """
    then, now, default = map(numbered, (then, now, default))
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return [] if then == now else [(path, then, now)]
    default = default if isinstance(default, dict) else {}
    found = []
    for name in dict.fromkeys([*then, *now]):
        usual = default.get(name, ABSENT)
        inner = f"{path}.{name}" if path else name
        found += differences(then.get(name, usual), now.get(name, ABSENT), usual, inner)
    return found


def numbered(value):
    """A list of configs as a dict by number, so that differences have a path; other values as they are."""
    configs = isinstance(value, list | tuple) and value and all(isinstance(one, dict) for one in value)
    return {str(i): one for i, one in enumerate(value)} if configs else value


def meaning(found):
    """The differences that change what the run means."""
    return [row for row in found if not any(re.fullmatch(pattern, row[0]) for pattern in FREE)]


def listed(found):
    return "".join(f"\n  {field}: {then!r} -> {now!r}" for field, then, now in found)


def compare(config: TrainConfig, workdir: Path, newest: int | None, allow_change: bool):
    """Compares a config with that of the run in `workdir`, and prints what is new.

    Args:
      newest: the step of its newest checkpoint. None: there is nothing to resume, so any config will do.
      allow_change: differences that change what the run means are printed, not refused.
    Raises: ConfigError when the run cannot go on with this config.
    """
    file = workdir / "config.json"
    if newest is None:
        if file.exists():
            print(
                f"{workdir} has a config.json but no checkpoint: "
                "there is nothing to resume, the run starts from the beginning",
                flush=True,
            )
        return
    if newest > config.steps:
        raise ConfigError(
            f"{workdir} is at step {newest} already, steps is {config.steps}. "
            "Give more steps, or another --workdir"
        )
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if not allow_change:
            raise ConfigError(
                f"{file} cannot be read ({error}), "
                "so that this config cannot be compared with that of the checkpoints beside it. "
                "Put it back, or pass --allow_change if you know that they agree"
            ) from error
        print(f"{file} cannot be read ({error}): the run goes on uncompared", flush=True)
        return
    now = json.loads(to_json(config))
    found = differences(then, now, dataclasses.asdict(TrainConfig()))
    changed = meaning(found)
    if changed:
        if not allow_change:
            raise ConfigError(
                f"the run in {workdir} was begun with other settings (then -> now):{listed(changed)}\n"
                "They change what it means. Give the former ones, or another --workdir, "
                "or --allow_change to go on with the new ones"
            )
        print(f"the run in {workdir} goes on with other settings (then -> now):{listed(changed)}", flush=True)


def same_data(then: dict, now: dict, allow_change: bool):
    """Compares the number of records and the content of the data set, then and now.

    `then` is the `Batches.state()` in the checkpoint, `now` that of this start. Raises ConfigError when they
    differ, or prints it with `allow_change`.
    """
    if then["records"] != now["records"]:
        what = (
            f"the data set had {then['records']:,} records when the run was saved, "
            f"now it has {now['records']:,}"
        )
        lost, so = "its place in the data is lost", "in another order"
    elif then["content"] != now["content"]:
        what = (
            f"the data set has as many records as when the run was saved, {now['records']:,}, "
            "but its file (data.path) says something else"
        )
        lost, so = "the run would go on with other data than it was begun with", "with what the file says now"
    else:
        return
    if not allow_change:
        raise ConfigError(f"{what}: {lost}. Give the former data, or --allow_change to go on anyway")
    print(f"{what}: the run goes on {so}", flush=True)


# What decides how a step is rounded
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
    """{library: its version}, which every checkpoint holds."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def same_versions(then: dict):
    """Prints which libraries differ from those, {library: version}, that a checkpoint was made with."""
    found = differences(then, versions())
    if found:
        print(
            f"the run goes on with other libraries than it was saved with (then -> now):{listed(found)}\n"
            "It means the same; its numbers may differ by rounding from those of a run in one go",
            flush=True,
        )


# The fields of a ModelConfig that say how a dialogue is put to the model
READING = ("layout", "image_place", "prompt", "user", "bot", "template")


def reading(c: ModelConfig) -> dict:
    """How a model reads dialogues and pictures."""
    own = {name: getattr(c, name) for name in READING}
    return own | {name: media(stream) for name, stream in c.streams.items()}


def media(stream: StreamConfig) -> dict:
    """How a stream prepares its media items: every field but the encoders and the adapter."""
    settings = dataclasses.asdict(stream)
    return {name: value for name, value in settings.items() if name not in ("encoders", "adapter")}


def same_reading(ours: ModelConfig, theirs: ModelConfig, source, allow_change: bool):
    """Compares how two models read dialogues and pictures.

    A trained part works only with the reading that it was trained on. Raises ConfigError with the flags that
    take over the settings of `source`, whose config is `theirs`; with `allow_change` prints the differences
    instead.
    """
    found = differences(reading(theirs), reading(ours), path="model")
    if not found:
        return
    what = (
        f"{source} was trained with another reading of dialogues and pictures (there -> here):{listed(found)}"
    )
    if not allow_change:
        flags = " ".join(shlex.quote(f"--config.{field}={then}") for field, then, _ in found)
        raise ConfigError(
            f"{what}\nTo take it over: {flags}\nPass --allow_change to train it on with this config's"
        )
    print(what, flush=True)


def write_config(config: TrainConfig, workdir: Path):
    """Writes WORKDIR/config.json, which `compare` reads when the run is resumed."""
    with writing(workdir / "config.json"):
        beside = workdir / "config.new"
        beside.write_text(to_json(config), encoding="utf-8")
        beside.replace(workdir / "config.json")
