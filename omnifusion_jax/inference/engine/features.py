"""Feature rows of media, kept on the device: each tile is encoded once, whoever asks about it."""

import collections
import hashlib

import jax.numpy as jnp
import numpy as np

from omnifusion_jax.inference.engine import programs
from omnifusion_jax.inference.engine.sizes import TILES, parts

BYTES = 64 * 2**20  # of the feature rows of a stream, unless they are very large; and at most
PLACES = 64  # tiles of it


class Features:
    """The feature rows of a stream's tiles, [places, rows, width], by what the tiles show.

    Those that a prompt still needs stay; of the others, those go first that nobody has asked for longest.
    """

    def __init__(self, name: str, stream, tile, width: int, dtype, ways: int, put):
        """`put` places an array whole on every device, `ways` is the number of pieces a batch is cut into."""
        self.name, self.stream, self.tile = name, stream, tile
        self.width, self.dtype, self.ways, self.put = width, dtype, ways, put
        self.sizes = TILES if ways == 1 else (ways,)
        self.make(places(tile, width, dtype))

    def make(self, places: int):
        self.kept = self.put(jnp.zeros((places, self.tile.rows, self.width), self.dtype))
        self.free = list(range(places))
        self.place = collections.OrderedDict()  # {name of a tile: its place}, asked for longest ago first
        self.users = collections.Counter()  # {name: prompts that need it}

    def hold(self, names, views) -> bool:
        """Encodes the tiles that are not there and keeps all of them until `release`.

        `names` has what `names` gives for the tiles of `views`. Returns False when there is no room now.
        """
        wanted = dict.fromkeys(names)
        missing = [name for name in wanted if name not in self.place]
        idle = [name for name in self.place if not self.users[name] and name not in wanted]
        if len(missing) > len(self.free) + len(idle):
            if +self.users:
                return False
            self.make(2 * len(wanted))
            missing = list(wanted)
        else:
            for name in idle[: max(0, len(missing) - len(self.free))]:
                self.free.append(self.place.pop(name))
        at = {name: i for i, name in reversed(list(enumerate(names)))}
        for name in missing:
            self.place[name] = self.free.pop()
        self.encode([at[name] for name in missing], [self.place[name] for name in missing], views)
        for name in wanted:
            self.users[name] += 1
            self.place.move_to_end(name)
        return True

    def warm_up(self):
        """Encodes blank tiles, as many as at any time."""
        for n in self.sizes:
            media = [np.zeros((n, *shape), self.tile.dtype) for shape in self.tile.shapes]
            nowhere = np.full(n, len(self.kept), np.int32)
            self.kept = programs.encode(self.stream, self.kept, media, nowhere)

    def release(self, names):
        """Says that a prompt needs these tiles no more."""
        self.users.subtract(dict.fromkeys(names, 1))

    def encode(self, tiles, places, views):
        """Encodes the tiles with these numbers into these places."""
        while tiles:
            n = parts(max(len(tiles), self.sizes[0]), self.sizes)
            now, there = tiles[:n], np.full(n, len(self.kept), np.int32)  # beyond all: nothing is kept of it
            there[: len(now)] = places[:n]
            media = [view[(now * n)[:n]] for view in views]
            self.kept = programs.encode(self.stream, self.kept, media, there)
            tiles, places = tiles[n:], places[n:]


def places(tile, width: int, dtype) -> int:
    """How many tiles of a stream find room from the beginning."""
    return min(PLACES, max(TILES[-1], BYTES // (tile.rows * width * dtype.itemsize)))


def names(views) -> list[bytes]:
    """A name for each tile of media, which only an equal tile has; `views` are arrays [tiles, ...]."""
    found = [hashlib.blake2b(digest_size=8) for _ in views[0]]
    for view in views:
        for name, tile in zip(found, view, strict=True):
            name.update(np.ascontiguousarray(tile))
    return [name.digest() for name in found]
