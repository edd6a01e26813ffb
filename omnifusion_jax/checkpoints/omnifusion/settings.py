"""omnifusion.json: what the published files cannot say, beside them."""

from pathlib import Path

from omnifusion_jax.checkpoints.storage.settings import read_json
from omnifusion_jax.config import ModelConfig, tuples
from omnifusion_jax.errors import CheckpointError

SETTINGS = "omnifusion.json"
ENCODERS = "encoders"  # in omnifusion.json: the names of the vision towers' directories

# Settings that the published files cannot say; omnifusion.json holds them
UNSAID = (
    "preset", "layout", "prompt", "image.fit", "image.unpad", "image.grids",
    "adapter.heads", "adapter.dropout", "adapter.eps", "adapter.align", "adapter.activation",
    "encoder.feature_layer", "encoder.feature_norm", "encoder.keep_class_token",
    "encoder2.feature_layer", "encoder2.feature_norm", "encoder2.keep_class_token",
)  # fmt: skip


def named_encoders(directory):
    """Paths of vision towers as omnifusion.json names them, in order; none where it does not."""
    file = directory / SETTINGS
    names = read_json(file).get(ENCODERS, []) if file.is_file() else []
    if not isinstance(names, list) or not all(
        isinstance(name, str) and Path(name).name == name for name in names
    ):
        raise CheckpointError(f"{file}: {ENCODERS} is {names!r:.100}, not a list of directories beside it")
    return [directory / name for name in names]


def apply_settings(config, pickled, file):
    """Sets what the pickled adapter and, where it is there, omnifusion.json say; what neither says is as published."""
    written = {}
    for key, value in (read_json(file) if file.is_file() else {}).items():
        if key == ENCODERS:
            continue
        written |= (
            {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
        )
    for key, value in {**pickled, **written}.items():
        if key not in UNSAID:
            raise CheckpointError(f"{file}: unknown setting {key}; it may hold {', '.join(UNSAID)}")
        if pickled.get(key, value) != value:
            raise CheckpointError(
                f"{file}: {key} is {value!r}, the pickled adapter says {pickled[key]!r}. Correct or remove it."
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


def settings(config: ModelConfig):
    """What omnifusion.json holds for a config."""
    written = {}
    for key in UNSAID:
        target, name = at(config, key)
        if target is None or not hasattr(target, name):
            continue
        *section, _ = key.split(".")
        (written.setdefault(section[0], {}) if section else written)[name] = getattr(target, name)
    return written


def at(config, key):
    """("adapter.heads" of a ModelConfig) to (config.image.adapter, "heads"); of a second encoder that is not there (None, name)."""
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
