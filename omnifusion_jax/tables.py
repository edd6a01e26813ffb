"""Tables of what varies: adapters, encoders, decoders, modalities, layouts, sources. Users can add rows."""

import importlib

from omnifusion_jax.errors import ConfigError


class Table(dict):
    """Rows by name.

    To add one, write `TABLE["mine"] = row` in a file that your config file imports, or

        @TABLE.row("mine")
        class Mine: ...

    Asking for a row that is not there raises ConfigError.
    """

    def __init__(self, what: str, *homes: str, rows=()):
        """Makes a table of `rows`.

        Args:
          what: what messages call a row.
          homes: the modules that put the shipped rows in. They are imported when a row is first asked for, so
            that importing the configs does not import the modules above them.
        """
        super().__init__(rows)
        self.what, self.homes = what, homes

    def __missing__(self, name):
        if name not in self.names():
            raise ConfigError(f"there is no {self.what} {name!r}; choose from {', '.join(self)}")
        return self[name]

    def names(self) -> tuple[str, ...]:
        """The names of all rows, including the shipped ones."""
        for home in self.homes:
            importlib.import_module(home)
        self.homes = ()
        return tuple(self)

    def row(self, name: str):
        """A decorator that puts a class or function into the table as the row `name`."""

        def put(thing):
            self[name] = thing
            return thing

        return put


# What turns features into token embeddings
ADAPTERS = Table("adapter", "omnifusion_jax.models.adapters")
# Modules, by the family that a DecoderConfig names
DECODERS = Table("decoder", "omnifusion_jax.models.decoder")
# Modules, by the kind that an EncoderConfig names
ENCODERS = Table("encoder", "omnifusion_jax.models.vit")
# What computes attention
KERNELS = Table("attention kernel", "omnifusion_jax.nn.attend", "omnifusion_jax.nn.kernels")
# How a dialogue and its media become a sequence
LAYOUTS = Table("layout", "omnifusion_jax.data.layout")
# Kinds of media, by the name of their stream
MODALITIES = Table("modality", "omnifusion_jax.data.pictures")
# What a run learns
OBJECTIVES = Table("objective", "omnifusion_jax.objectives")
# Where dialogues come from, by what stands before ":" in data.path
SOURCES = Table("source", "omnifusion_jax.data.sources")
