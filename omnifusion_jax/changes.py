"""What a run prints about its config: how it differs from the config file, and its model from the preset."""

from omnifusion_jax.cli.help import short
from omnifusion_jax.config import ModelConfig, TrainConfig
from omnifusion_jax.fields import differences
from omnifusion_jax.models.presets import PRESETS, preset

ROOM = 60  # characters of a value


def changes(config: TrainConfig, file: TrainConfig) -> str:
    """The lines that a run prints at its start.

    `file` is the config that the config file gives, without the changes of the command line.
    """
    name = config.model.preset
    beside = {
        path: pair
        for path, pair in differences(config, file).items()
        if not path.startswith("model.") or path == "model.preset"
    }
    model = differences(config.model, preset(name) if name in PRESETS else ModelConfig())
    model = {f"model.{path}": pair for path, pair in model.items() if path not in ("preset", "filled_from")}
    start = f"the preset {name}" if name in PRESETS else "a model's defaults"
    return "\n".join([*told("the config file", beside), *told(start, model)])


def told(what: str, pairs: dict[str, tuple]) -> list[str]:
    """Lines for the differences from `what`."""
    if not pairs:
        return [f"As {what} says."]
    widest = max(map(len, pairs))
    lines = [f"As {what} says, except:"]
    for path, (ours, theirs) in pairs.items():
        lines.append(f"  {path:{widest}}  {short(ours, ROOM)}  (not {short(theirs, ROOM)})")
    return lines
