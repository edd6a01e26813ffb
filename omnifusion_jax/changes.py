"""What a run says of its config: where it differs from the config file, and its model from its preset."""

from omnifusion_jax.cli.help import short
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.fields import values
from omnifusion_jax.models.presets import PRESETS, preset

ROOM = 60  # characters of a value


def changes(config, file):
    """Lines for the start of a run.

    `file` is the TrainConfig that the config file gives, before the command line changed it.
    """
    name = config.model.preset
    beside = {
        path: pair
        for path, pair in differences(config, file).items()
        if not path.startswith("model.") or path == "model.preset"
    }
    model = differences(config.model, preset(name) if name in PRESETS else ModelConfig())
    model = {f"model.{path}": pair for path, pair in model.items() if path not in ("preset", "filled_from")}
    return "\n".join(
        [
            *told("the config file", beside),
            *told(f"the preset {name}" if name in PRESETS else "a model's defaults", model),
        ]
    )


def differences(ours, theirs):
    """{path: (our value, their value)} where two dataclasses differ; None stands for what the other has not."""
    ours, theirs = values(ours), values(theirs)
    return {path: (value, theirs.get(path)) for path, value in ours.items() if value != theirs.get(path)}


def told(what, pairs):
    if not pairs:
        return [f"As {what} says."]
    widest = max(map(len, pairs))
    return [
        f"As {what} says, except:",
        *(f"  {path:{widest}}  {short(a, ROOM)}  (not {short(b, ROOM)})" for path, (a, b) in pairs.items()),
    ]
