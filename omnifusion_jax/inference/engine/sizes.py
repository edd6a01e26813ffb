"""The few sizes that programs are compiled for."""

from typing import NamedTuple

STEP = 64  # lengths are multiples of this
CHUNKS = tuple(range(STEP, 8 * STEP + 1, STEP))  # positions of a prompt that are read at a time
TOGETHER = (1, 4, 16)  # prompts that are read at a time,
TOKENS = 2048  # of so many positions together at most
TILES = (1, 4, 16)  # tiles of media that are encoded at a time
UNBOUNDED = 2**30


class Piece(NamedTuple):
    """What is read of a prompt at a time."""

    start: int  # its first column
    size: int  # columns that the program is made for; 0: nothing is left to read
    count: int  # columns with something in them


def piece(read: int, end: int, length: int, chunks: tuple[int, ...]) -> Piece:
    """The next Piece of a prompt of `end` columns of which `read` are read, in a slot of `length` columns.

    At the end of the slot it begins earlier, and reads again what is known, rather than go beyond.
    """
    if read == end:
        return Piece(read, 0, 0)
    fitting = [size for size in chunks if size <= length]
    size = next((size for size in fitting if size >= end - read), fitting[-1])
    start = min(read, length - size)
    return Piece(start, size, min(size, end - start))


def most(window: int | None, chunks: tuple[int, ...]) -> int:
    """Columns that a prompt needs at most.

    They are the window, and two pieces of a prompt to write in place of others. One piece is read, and
    another may be read again: see `piece`.
    """
    return UNBOUNDED if window is None else -(-(window + 2 * chunks[-1]) // STEP) * STEP


def together(size: int, count: int) -> tuple[int, ...]:
    """Numbers of pieces of `size` columns that are read at a time, in a cache of `count` slots."""
    return tuple(n for n in TOGETHER if n == 1 or (n <= count and n * size <= TOKENS))


def parts(count: int, sizes: tuple[int, ...]) -> int:
    """How many of `count` things are done in the next call: the largest of the sizes that they fill."""
    return max(size for size in sizes if size <= count)


def lengths(most: int) -> tuple[int, ...]:
    """Lengths of slots, up to `most` or beyond: multiples of STEP that grow by about a quarter."""
    found = [STEP]
    while found[-1] < most:
        last = found[-1]
        found.append(last + max(STEP, 1 << (last.bit_length() - 3)))
    return tuple(found)


def doubled(first: int, most: int) -> tuple[int, ...]:
    """`first`, doubled until `most` is reached."""
    found = [first]
    while found[-1] < most:
        found.append(2 * found[-1])
    return tuple(found)


def fitting(sizes: tuple[int, ...], count: int) -> int:
    """The smallest of some sizes, from small to large, that `count` fits; the largest if none does."""
    return next((size for size in sizes if size >= count), sizes[-1])
