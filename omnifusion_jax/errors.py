"""Errors that a user can meet. Each message says what is wrong, where (file, line, key), and what to do."""


class OmniFusionError(ValueError):
    """The base of every error that this library raises on purpose."""


class ConfigError(OmniFusionError):
    """A configuration that cannot work."""


class DataError(OmniFusionError):
    """A picture, a dialogue or a request that cannot be used."""


class CheckpointError(OmniFusionError):
    """A checkpoint that is unsafe, unknown, or does not fit the model."""
