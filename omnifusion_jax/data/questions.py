"""Captions and questions about synthetic scenes, in English and Russian."""

from omnifusion_jax.data.synthetic import COLOURS, PLACES, SHAPES, SIZES

# Russian: shape -> (nominative, genitive plural, gender); adjective -> its forms by gender (0 m, 1 f, 2 n)
RU_SHAPES = {
    "circle": ("круг", "кругов", 0),
    "square": ("квадрат", "квадратов", 0),
    "triangle": ("треугольник", "треугольников", 0),
    "star": ("звезда", "звёзд", 1),
    "cross": ("крест", "крестов", 0),
    "ring": ("кольцо", "колец", 2),
}
RU_ADJECTIVES = {
    "red": ("красный", "красная", "красное"),
    "green": ("зелёный", "зелёная", "зелёное"),
    "blue": ("синий", "синяя", "синее"),
    "yellow": ("жёлтый", "жёлтая", "жёлтое"),
    "purple": ("фиолетовый", "фиолетовая", "фиолетовое"),
    "orange": ("оранжевый", "оранжевая", "оранжевое"),
    "white": ("белый", "белая", "белое"),
    "small": ("маленький", "маленькая", "маленькое"),
    "large": ("большой", "большая", "большое"),
}
RU_PLACES = (
    "слева вверху",
    "вверху",
    "справа вверху",
    "слева",
    "в центре",
    "справа",
    "слева внизу",
    "внизу",
    "справа внизу",
)


class English:
    """The words and sentences of one language; `Russian` has the same members."""

    describe = "Describe the picture."
    written = "What is written?"
    count = "How many shapes are there?"
    nothing, yes, no = "nothing", "yes", "no"
    places = PLACES
    says = "it says {}"

    shape = staticmethod(lambda shape: shape)
    adjective = staticmethod(lambda word, shape: word)
    name = staticmethod(lambda *words: " ".join(words))  # [size,] colour, shape

    colour_of = staticmethod(lambda shape: f"What colour is the {shape}?")
    shape_of = staticmethod(lambda colour: f"What shape is {colour}?")
    where = staticmethod(lambda colour, shape: f"Where is the {colour} {shape}?")
    what_at = staticmethod(lambda place: f"What is at the {PLACES[place]}?")
    count_of = staticmethod(lambda shape: f"How many {shape}{'es' if shape == 'cross' else 's'} are there?")
    size_of = staticmethod(lambda colour, shape: f"Is the {colour} {shape} small or large?")
    exists = staticmethod(
        lambda colour, shape: f"Is there {'an' if colour == 'orange' else 'a'} {colour} {shape}?"
    )


def ru_adjective(word, shape):
    return RU_ADJECTIVES[word][RU_SHAPES[shape][2]]


def ru_name(*words):
    *adjectives, shape = words
    return " ".join([*(ru_adjective(word, shape) for word in adjectives), RU_SHAPES[shape][0]])


class Russian:
    describe = "Опиши картинку."
    written = "Что написано?"
    count = "Сколько здесь фигур?"
    nothing, yes, no = "ничего", "да", "нет"
    places = RU_PLACES
    says = "написано {}"

    shape = staticmethod(lambda shape: RU_SHAPES[shape][0])
    adjective = staticmethod(ru_adjective)
    name = staticmethod(ru_name)

    colour_of = staticmethod(lambda shape: f"Какого цвета {RU_SHAPES[shape][0]}?")
    shape_of = staticmethod(lambda colour: f"Какая фигура {RU_ADJECTIVES[colour][1]}?")
    where = staticmethod(lambda colour, shape: f"Где {ru_name(colour, shape)}?")
    what_at = staticmethod(lambda place: f"Что {RU_PLACES[place]}?")
    count_of = staticmethod(lambda shape: f"Сколько здесь {RU_SHAPES[shape][1]}?")
    size_of = staticmethod(lambda colour, shape: f"Какого размера {ru_name(colour, shape)}?")
    exists = staticmethod(lambda colour, shape: f"Есть ли здесь {ru_name(colour, shape)}?")


LANGUAGES = (English, Russian)


def caption(scene, language) -> str:
    """What there is in a scene, thing by thing."""
    parts = [f"{language.name(t.size, t.colour, t.shape)} {language.places[t.place]}" for t in scene.things]
    if scene.text:
        parts.append(language.says.format(scene.text))
    return ", ".join(parts)


# Each of the following asks one kind of question about a scene: (question, answer), or None if the scene
# allows no such question.


def colour(scene, language, rng):
    shape = pick(rng, unique([t.shape for t in scene.things]))
    thing = next((t for t in scene.things if t.shape == shape), None)
    return thing and (language.colour_of(shape), language.adjective(thing.colour, shape))


def shape(scene, language, rng):
    colour = pick(rng, unique([t.colour for t in scene.things]))
    thing = next((t for t in scene.things if t.colour == colour), None)
    return thing and (language.shape_of(colour), language.shape(thing.shape))


def where(scene, language, rng):
    thing = pick(rng, unnamed_twice(scene))
    return thing and (language.where(thing.colour, thing.shape), language.places[thing.place])


def size(scene, language, rng):
    thing = pick(rng, unnamed_twice(scene))
    if thing is None:
        return None
    return language.size_of(thing.colour, thing.shape), language.adjective(thing.size, thing.shape)


def what_at(scene, language, rng):
    if rng.random() < 0.2:
        places = [p for p in range(9) if scene.at(p) is None]
    else:
        places = [t.place for t in scene.things]
    place = pick(rng, places)
    if place is None:
        return None
    thing = scene.at(place)
    answer = language.name(thing.size, thing.colour, thing.shape) if thing else language.nothing
    return language.what_at(place), answer


def count(scene, language, rng):
    return language.count, str(len(scene.things))


def count_of(scene, language, rng):
    shapes = [t.shape for t in scene.things] if rng.random() < 0.75 else SHAPES
    shape = pick(rng, shapes)
    return language.count_of(shape), str(sum(t.shape == shape for t in scene.things))


def exists(scene, language, rng):
    """Asks half of the time for a thing that is there, else with its colour or its shape drawn anew."""
    thing = pick(rng, scene.things)
    colour, shape = thing.colour, thing.shape
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            colour = pick(rng, list(COLOURS))
        else:
            shape = pick(rng, SHAPES)
    found = any((t.colour, t.shape) == (colour, shape) for t in scene.things)
    return language.exists(colour, shape), language.yes if found else language.no


def written(scene, language, rng):
    if not scene.text and rng.random() >= 0.15:  # seldom asked where nothing is written
        return None
    return language.written, scene.text or language.nothing


KINDS = (colour, shape, where, size, what_at, count, count_of, exists, written)


def questions(scene, rng, number: int) -> list[tuple[str, str]]:
    """`number` different questions as (question, answer), each in a language drawn at random."""
    found = {}
    while len(found) < number:
        language = LANGUAGES[rng.integers(2)]
        asked = KINDS[rng.integers(len(KINDS))](scene, language, rng)
        if asked:
            found[asked[0]] = asked[1]
    return list(found.items())


def pick(rng, options):
    """One of the options at random, None if there are none."""
    return options[rng.integers(len(options))] if len(options) else None


def unique(values):
    """The values that occur only once."""
    return [v for v in values if values.count(v) == 1]


def unnamed_twice(scene):
    """The things of a scene whose colour and shape no other has."""
    names = [(t.colour, t.shape) for t in scene.things]
    return [t for t in scene.things if names.count((t.colour, t.shape)) == 1]


assert set(RU_ADJECTIVES) == {*COLOURS, *SIZES}
