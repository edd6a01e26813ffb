"""Pictures drawn on the fly, and what there is to say about them.

A picture is a grid of three by three places. Things differ in shape, colour and size. A number or a short
word may stand in one row, one character in each place. Everything about sample `i` of a split follows from
`i` alone. For every colour and shape one place is held out: training never shows this combination, and every
picture of the held-out split shows at least one of them.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE, CELL = 96, 32  # pixels a side of a picture and of a place
COLOURS = {
    "red": (225, 45, 45),
    "green": (45, 185, 60),
    "blue": (55, 95, 235),
    "yellow": (240, 220, 50),
    "purple": (160, 60, 200),
    "orange": (245, 140, 30),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 8, "large": 14}  # radius in pixels
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
WORDS = (
    "ant", "box", "bus", "car", "cat", "cup", "dog", "egg", "fox", "hat", "ice",
    "jam", "key", "map", "owl", "pen", "sun", "toy", "van", "yak", "zip",
)  # fmt: skip
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
SPLITS = ("train", "held-out")


@dataclasses.dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str
    place: int  # 0..8, row by row


@dataclasses.dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # in the order of their places
    text: str = ""  # a number or a word; character k stands in column k
    row: int = 0  # of the text

    def at(self, place: int) -> Thing | str | None:
        """What stands at a place: a Thing, a character or nothing."""
        column, row = place % 3, place // 3
        if row == self.row and column < len(self.text):
            return self.text[column]
        return next((t for t in self.things if t.place == place), None)


def held_out(colour: str, shape: str, place: int) -> bool:
    """Whether training never shows this combination: one place in nine for every colour and shape."""
    return (2 * tuple(COLOURS).index(colour) + 5 * SHAPES.index(shape) + place) % len(PLACES) == 0


def draw_scene(rng, split: str) -> Scene:
    """A random scene of one to four things, and sometimes a text."""
    text, row, free = "", 0, list(range(9))
    if rng.random() < 0.4:
        text = str(rng.integers(0, 1000)) if rng.random() < 0.6 else str(rng.choice(WORDS))
        row = int(rng.integers(3))
        free = [p for p in free if p // 3 != row or p % 3 >= len(text)]
    places = rng.permutation(free)[: rng.integers(1, 5)]
    things = []
    for place in places:
        # the first thing of a held-out picture is a held-out combination, its other things may be
        wanted = split == "held-out" and not things
        while True:
            size = str(rng.choice(list(SIZES)))
            colour = str(rng.choice(list(COLOURS)))
            shape = str(rng.choice(SHAPES))
            thing = Thing(size, colour, shape, int(place))
            hidden = held_out(thing.colour, thing.shape, thing.place)
            fits = hidden if wanted else (not hidden or split == "held-out")
            if fits:
                break
        things.append(thing)
    return Scene(tuple(sorted(things, key=lambda t: t.place)), text, row)


def star(x, y, r):
    """The ten corners of a star around (x, y)."""
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2, 0.45 * r, 1.1 * r)
    return list(zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True))


DRAW = {
    "circle": lambda d, x, y, r, c: d.ellipse((x - r, y - r, x + r, y + r), fill=c),
    "square": lambda d, x, y, r, c: d.rectangle((x - r, y - r, x + r, y + r), fill=c),
    "triangle": lambda d, x, y, r, c: d.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=c),
    "star": lambda d, x, y, r, c: d.polygon(star(x, y, r), fill=c),
    "cross": lambda d, x, y, r, c: [
        d.rectangle((x - a, y - b, x + a, y + b), fill=c) for a, b in ((r, r / 3), (r / 3, r))
    ],
    "ring": lambda d, x, y, r, c: d.ellipse((x - r, y - r, x + r, y + r), outline=c, width=max(2, r // 3)),
}
FONT = ImageFont.load_default(26)


def render(scene: Scene, rng) -> np.ndarray:
    """Draws a scene: uint8[96, 96, 3], dark noisy ground, places, sizes and colours a little off."""
    ground = rng.integers(0, 70, 3)
    image = Image.new("RGB", (SIZE, SIZE), tuple(int(g) for g in ground))
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        shift = rng.integers(-2, 3, 2)
        x = CELL * thing.place % SIZE + CELL / 2 + shift[0]
        y = CELL * (thing.place // 3) + CELL / 2 + shift[1]
        colour = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-15, 16, 3), 0, 255)
        radius = SIZES[thing.size] + int(rng.integers(-1, 2))
        DRAW[thing.shape](pen, x, y, radius, tuple(int(c) for c in colour))
    for column, character in enumerate(scene.text):
        shift = rng.integers(-2, 3, 2)
        at = (CELL * column + CELL / 2 + shift[0], CELL * scene.row + CELL / 2 + shift[1])
        pen.text(at, character, font=FONT, fill=(200, 200, 200), anchor="mm")
    noise = rng.integers(-12, 13, (SIZE, SIZE, 3), dtype=np.int16)
    return np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8)


LETTERS = {"circle": "c", "square": "s", "triangle": "t", "star": "a", "cross": "x", "ring": "o"}


def cell_word(content: Thing | str | None) -> str:
    """One short word for what stands in a place.

    "rC" is a large red circle, "rc" a small one, "k" the letter k, "H" the digit 7 ("A" is 0); "empty" says
    that nothing stands there.
    """
    if content is None:
        return "empty"
    if isinstance(content, str):
        return "ABCDEFGHIJ"[int(content)] if content.isdigit() else content
    letter = LETTERS[content.shape]
    return content.colour[0] + (letter.upper() if content.size == "large" else letter)


CELL_WORDS = (
    cell_word(None),
    *map(cell_word, CHARACTERS),
    *(cell_word(Thing(size, colour, shape, 0)) for size in SIZES for colour in COLOURS for shape in SHAPES),
)


def patch_words(scene: Scene, side: int) -> list[str]:
    """A map of the scene: the word of the place where each of side x side patches lies, row by row."""
    cells = [cell_word(scene.at(place)) for place in range(9)]
    return [cells[3 * (3 * i // side) + 3 * j // side] for i in range(side) for j in range(side)]


def scene_and_rng(index: int, split: str) -> tuple[Scene, np.random.Generator]:
    """The scene of sample `index` of a split, and the generator for drawing it and asking about it."""
    rng = np.random.default_rng([SPLITS.index(split), index])
    return draw_scene(rng, split), rng
