"""Tables of what varies: adapters, decoder families, sources, layouts, objectives. They are open."""

import importlib

from omnifusion_jax.errors import ConfigError


class Table(dict):
    """Rows by name. A row of your own is `TABLE["mine"] = row`, in a file that your config file imports, or

        @TABLE.row("mine")
        class Mine: ...

    Asking for a row that is not there raises ConfigError.
    """

    def __init__(self, what, home=None, rows=()):
        """`what`: a row, in messages. `home`: the module that puts the shipped rows in; it is imported when one is
        first asked for, so that a config can be validated without the rooms above it."""
        super().__init__(rows)
        self.what, self.home = what, home

    def __missing__(self, name):
        if name not in self.names():
            raise ConfigError(f"there is no {self.what} {name!r}; choose from {', '.join(self)}")
        return self[name]

    def names(self):
        """Of all rows, the shipped ones among them."""
        if self.home:
            importlib.import_module(self.home)
        return tuple(self)

    def row(self, name):
        """Decorates what becomes the row `name`."""

        def put(thing):
            self[name] = thing
            return thing

        return put


ADAPTERS = Table("adapter", "omnifusion_jax.models.adapters")  # what turns features into token embeddings
DECODERS = Table(
    "decoder", "omnifusion_jax.models.decoder"
)  # modules, by the family that a DecoderConfig names
ENCODERS = Table("encoder", "omnifusion_jax.models.vit")  # modules, by the kind that an EncoderConfig names
LAYOUTS = Table("layout", "omnifusion_jax.data.layout")  # where everything stands in a sequence
OBJECTIVES = Table("objective", "omnifusion_jax.objectives")  # what a run learns
SOURCES = Table(
    "source", "omnifusion_jax.data.sources"
)  # where dialogues come from, by what stands before ":" in data.path
