"""What a run that goes on must have in common with the one that was begun: its config, compared field by field."""

import dataclasses
import json
import re
import shlex

from omnifusion_jax.config import TrainConfig, to_json
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.training.workdir import writing

ABSENT = "(no such field)"

# Fields that may change from start to start, and why. All others change what the run means, those not yet thought of among them.
FREE = (
    r"mesh\..*",  # where arrays lie: the same sums, to rounding
    r"remat",  # what is kept and what is computed again: the same values
    r"checkpoint\..*",  # how often the state is saved, and in what form the model is written at the end
    r"eval\..*",  # measures, and teaches nothing
    r"log_every",  # what is written down
    r"max_bad_steps",  # when to give up
    r"data\.num_workers",  # who reads, not what is read
    r"data\.check",  # what is looked at beforehand
    r"data\.(on_bad_sample|bad_share)",  # the advice after a bad sample; good samples and their order stay
)


def differences(then, now, default=None, path=""):
    """[(field, value then, value now)] of two configs as nested dicts. A field that `then` lacks had what `default` has."""
    then, now, default = map(numbered, (then, now, default))
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return [] if then == now else [(path, then, now)]
    default = default if isinstance(default, dict) else {}
    found = []
    for name in dict.fromkeys([*then, *now]):
        usual = default.get(name, ABSENT)
        found += differences(
            then.get(name, usual), now.get(name, ABSENT), usual, f"{path}.{name}" if path else name
        )
    return found


def numbered(value):
    """A list of configs as a dict by number, in which differences have a place."""
    configs = isinstance(value, list | tuple) and value and all(isinstance(one, dict) for one in value)
    return {str(i): one for i, one in enumerate(value)} if configs else value


def meaning(found):
    """Those differences that change what the run means."""
    return [row for row in found if not any(re.fullmatch(pattern, row[0]) for pattern in FREE)]


def listed(found):
    return "".join(f"\n  {field}: {then!r} -> {now!r}" for field, then, now in found)


def compare(config, workdir, newest, allow_change):
    """Raises ConfigError where the run in `workdir` cannot go on with this config; says what is new about it.

    Args:
      newest: the step of its newest checkpoint, None where it has none; then there is nothing to go on with, and any config will do.
      allow_change: differences in meaning are printed, not refused.
    """
    file = workdir / "config.json"
    if newest is None:
        if file.exists():
            print(
                f"{workdir} has a config.json but no checkpoint: there is nothing to resume, the run starts from the beginning",
                flush=True,
            )
        return
    if newest > config.steps:
        raise ConfigError(
            f"{workdir} is at step {newest} already, steps is {config.steps}. Give more steps, or another --workdir"
        )
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if not allow_change:
            raise ConfigError(
                f"{file} cannot be read ({error}), so that this config cannot be compared with that of the checkpoints beside it. "
                "Put it back, or pass --allow_change if you know that they agree"
            ) from error
        print(f"{file} cannot be read ({error}): the run goes on uncompared", flush=True)
        return
    as_json = lambda c: json.loads(to_json(c))
    found = differences(then, as_json(config), dataclasses.asdict(TrainConfig()))
    if changed := meaning(found):
        if not allow_change:
            raise ConfigError(
                f"the run in {workdir} was begun with other settings (then -> now):{listed(changed)}\n"
                "They change what it means. Give the former ones, or another --workdir, or --allow_change to go on with the new ones"
            )
        print(f"the run in {workdir} goes on with other settings (then -> now):{listed(changed)}", flush=True)


def same_data(then, now, allow_change):
    """Compares the data set's number of records and its content, of two `Batches.state()`: of the checkpoint, and of this start.

    Raises ConfigError, or prints, as `compare`.
    """
    if then["records"] != now["records"]:
        what = f"the data set had {then['records']:,} records when the run was saved, now it has {now['records']:,}"
        lost, so = "its place in the data is lost", "in another order"
    elif then["content"] != now["content"]:
        what = f"the data set has as many records as when the run was saved, {now['records']:,}, but its file (data.path) says something else"
        lost, so = "the run would go on with other data than it was begun with", "with what the file says now"
    else:
        return
    if not allow_change:
        raise ConfigError(f"{what}: {lost}. Give the former data, or --allow_change to go on anyway")
    print(f"{what}: the run goes on {so}", flush=True)


READING = (
    "layout",
    "image_place",
    "prompt",
    "user",
    "bot",
    "template",
    "image_token",
)  # of a ModelConfig: how a dialogue is put to the model


def media(stream):
    """How a StreamConfig prepares its items: all of it but encoders and adapter."""
    return {
        name: value
        for name, value in dataclasses.asdict(stream).items()
        if name not in ("encoders", "adapter")
    }


def same_reading(ours, theirs, source, allow_change):
    """Compares how two ModelConfigs read dialogues and pictures: parts that were trained on one reading know no other.

    Raises ConfigError with the flags that take over those of `source`, or prints the differences, as `compare`.
    """
    of = lambda c: (
        {name: getattr(c, name) for name in READING}
        | {name: media(stream) for name, stream in c.streams.items()}
    )
    if not (found := differences(of(theirs), of(ours), path="model")):
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


def write_config(config, workdir):
    """WORKDIR/config.json, with which later starts are compared."""
    with writing(workdir / "config.json"):
        beside = workdir / "config.new"
        beside.write_text(to_json(config), encoding="utf-8")
        beside.replace(workdir / "config.json")
