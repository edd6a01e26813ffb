"""Errors that a user can meet. Each message says what is wrong, where (file, line, key), and what to do."""


class OmniFusionError(ValueError):
    """The base of every error that this library raises on purpose."""


class ConfigError(OmniFusionError):
    """A configuration that cannot work."""


class DataError(OmniFusionError):
    """A picture, a dialogue or a request that cannot be used.

    `reason` is a word that all errors of its kind share, such as "missing"; docs/data.md lists them.
    """

    def __init__(self, message: str, reason: str = "other"):
        super().__init__(message, reason)
        self.message, self.reason = message, reason

    def __str__(self):
        return self.message

    def at(self, where: str) -> "DataError":
        """The same error with a place before its message."""
        return DataError(f"{where}: {self.message}", self.reason)


class CheckpointError(OmniFusionError):
    """A checkpoint that is unsafe, unknown, or does not fit the model."""


class HostError(OmniFusionError):
    """Another host ended or is missing, so that this one cannot go on."""
