"""What an engine keeps on the device, and the calls that change it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.inference import options as opt
from omnifusion_jax.inference.engine import programs
from omnifusion_jax.inference.engine.features import Features
from omnifusion_jax.inference.search import Texts
from omnifusion_jax.nn.choice import DECODING, Choice, using
from omnifusion_jax.sharding import replicated, ways


class Device:
    """The State of an engine, the feature rows of media, and the options of all rows.

    It does as it is told: who is in which slot is the scheduler's matter.
    """

    def __init__(self, model, sizes: opt.Sizes, cache: str | None, most: int):
        """`most`: columns for prompts at most; where there are as many, they are a ring, see programs.py."""
        self.most = most
        self.module, self.mesh, self.sizes = model.module, model.mesh, sizes
        # how many pieces the slots are cut into; what belongs to a slot must then stay where it is
        self.ways = 1 if self.mesh is None else ways(self.mesh, "batch")
        c, tiles = self.module.decoder.config, model.prepare.tiles
        self.dtype = jnp.dtype(self.module.decoder.dtype)
        self.cache = cache  # the dtype of the cache; None: that of the model
        (device, *_) = jax.tree.leaves(self.module)[0].devices()
        # For a kernel all of a cache of another dtype would be converted; XLA does it as it multiplies.
        kernels = DECODING if cache is None else ("few", "dense")
        self.attention = Choice.of("auto", device.platform, kernels)  # when tokens are chosen
        with self.spread():
            self.features = [
                Features(
                    name, getattr(self.module, name), tiles[name], c.width, self.dtype, self.ways, self.put
                )
                for name in self.module.streams
            ]
        self.reset()

    def reset(self):
        """Forgets all slots."""
        self.state, self.table, self.options, self.count, self.length = None, None, None, 0, 0

    def spread(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def put(self, a):
        """An array, whole on every device."""
        return jnp.asarray(a) if self.mesh is None else jax.device_put(a, replicated(self.mesh))

    def columns(self, length: int) -> int:
        """Columns of a slot for `length` positions, and those that answers of several beams have besides."""
        beams = self.sizes.beams
        return min(length, self.most) + (beams * self.sizes.room if beams > 1 else 0)

    def grow(self, count: int, length: int) -> programs.State:
        """The State with more slots, or longer ones."""
        return programs.grow(self.state, count, self.columns(length), self.sizes)

    def resize(self, count: int, length: int, sizes: opt.Sizes) -> bool:
        """Makes `count` slots of `length` positions. Returns whether they still hold what they held."""
        if (count, length, sizes) == (self.count, self.length, self.sizes):
            return True
        kept = self.state is not None and sizes == self.sizes
        self.sizes, table = sizes, opt.blank(count * sizes.beams, sizes)
        if kept:
            # One after the other: so fewer programs lead from one size to the next.
            if count > self.count:
                self.state = self.grow(count, self.length)
            if self.columns(length) > self.columns(self.length):
                self.state = self.grow(count, length)
            opt.write(table, np.s_[: self.count * sizes.beams], self.table)
        else:
            self.state = None  # first, so that there is room
            columns = self.columns(length)
            self.state = programs.start(self.module.decoder, count, columns, sizes, self.cache)
        self.table, self.options = table, None
        self.count, self.length = count, length
        return kept

    def ask(self, rows: list[int], options: opt.Options):
        """Says what some rows are asked."""
        opt.write(self.table, rows, options)
        self.options = None

    def allow(self, row: int, mask: np.ndarray):
        """Says which tokens may come next in a row, uint32[words]."""
        self.table.allowed[row] = mask[: self.sizes.words]  # there may be more, of no token
        if self.options is not None:
            self.options = self.options._replace(allowed=None)

    def extend(self, chunk: programs.Chunk, fresh: bool):
        kept = [features.kept for features in self.features]
        self.state = programs.extend(self.module, kept, self.state, chunk, fresh)

    def copy(self, source: int, target: int):
        self.state = programs.copy(self.state, np.int32(source), np.int32(target))

    def clear(self, slot: int):
        self.state = programs.clear(self.state, np.int32(slot))

    def advance(self, rows: programs.Rows, count: int, eager: bool) -> programs.Report:
        if self.options is None:
            # a copy: the table changes while the device may still read it
            self.options = jax.tree.map(lambda a: self.put(a.copy()), self.table)
        if self.options.allowed is None:
            self.options = self.options._replace(allowed=self.put(self.table.allowed.copy()))
        with using(self.attention):
            self.state, report = programs.advance(
                self.module.decoder,
                self.state,
                rows,
                self.options,
                np.int32(count),
                np.bool_(eager),
                self.sizes,
            )
        return report

    def answers(self) -> Texts:
        """The answers of all rows, as NumPy arrays."""
        return jax.device_get(programs.answers(self.state.search, self.options))
