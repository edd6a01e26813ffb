"""omnifusion.json, which lies beside the published files and says what they cannot say."""

from pathlib import Path

from omnifusion_jax.checkpoints.storage.settings import read_json
from omnifusion_jax.config import ModelConfig, tuples
from omnifusion_jax.errors import CheckpointError

SETTINGS = "omnifusion.json"
ENCODERS = "encoders"  # in omnifusion.json: the names of the vision towers' directories

# The settings that the published files cannot say and omnifusion.json may hold
UNSAID = (
    "preset", "layout", "prompt", "image_place", "image.fit", "image.unpad", "image.grids",
    "adapter.heads", "adapter.dropout", "adapter.eps", "adapter.align", "adapter.activation",
    "encoder.feature_layer", "encoder.feature_norm", "encoder.keep_class_token",
    "encoder2.feature_layer", "encoder2.feature_norm", "encoder2.keep_class_token",
)  # fmt: skip


def named_encoders(directory: Path) -> list[Path]:
    """Paths of the vision towers that omnifusion.json names, in order; empty if it names none.

    Raises:
      CheckpointError: it does not name directories beside itself.
    """
    file = directory / SETTINGS
    names = read_json(file).get(ENCODERS, []) if file.is_file() else []
    plain = isinstance(names, list) and all(
        isinstance(name, str) and Path(name).name == name for name in names
    )
    if not plain:
        raise CheckpointError(f"{file}: {ENCODERS} is {names!r:.100}, not a list of directories beside it")
    return [directory / name for name in names]


def apply_settings(config: ModelConfig, pickled: dict, file: Path):
    """Sets in `config` what the pickled adapter says, and what omnifusion.json says if it is there.

    What neither says stays as it is.

    Raises:
      CheckpointError: a setting is unknown, of a wrong type, or not one of this model's, or the two sources
        contradict each other.
      ConfigError: the settings do not fit each other.
    """
    written = {}
    for key, value in (read_json(file) if file.is_file() else {}).items():
        if key == ENCODERS:
            continue
        if isinstance(value, dict):
            written |= {f"{key}.{name}": v for name, v in value.items()}
        else:
            written[key] = value
    for key, value in {**pickled, **written}.items():
        if key not in UNSAID:
            raise CheckpointError(f"{file}: unknown setting {key}; it may hold {', '.join(UNSAID)}")
        if pickled.get(key, value) != value:
            raise CheckpointError(
                f"{file}: {key} is {value!r}, the pickled adapter says {pickled[key]!r}. "
                "Correct or remove it."
            )
        target, name = at(config, key)
        if target is None:
            raise CheckpointError(f"{file}: {key} is of a second encoder, and there is one. Remove it.")
        if not hasattr(target, name):
            raise CheckpointError(f"{file}: an adapter of the kind {target.kind!r} has no {key}. Remove it.")
        kind, value = type(getattr(target, name)), tuples(value)
        if not isinstance(value, (int, float) if kind is float else kind):
            raise CheckpointError(f"{file}: {key} is {value!r:.100}, not of type {kind.__name__}")
        setattr(target, name, value)
    config.validate()


def settings(config: ModelConfig) -> dict:
    """The content of omnifusion.json for a config."""
    written = {}
    for key in UNSAID:
        target, name = at(config, key)
        if target is None or not hasattr(target, name):
            continue
        *section, _ = key.split(".")
        group = written.setdefault(section[0], {}) if section else written
        group[name] = getattr(target, name)
    return written


def at(config: ModelConfig, key: str):
    """(object, field name) of a setting: "adapter.heads" is (config.image.adapter, "heads").

    The object is None for a setting of a second encoder that is not there.
    """
    section, _, name = key.rpartition(".")
    first, *rest = config.image.encoders
    sections = {
        "": config,
        "image": config.image,
        "adapter": config.image.adapter,
        "encoder": first,
        "encoder2": rest[0] if rest else None,
    }
    return sections[section], name
