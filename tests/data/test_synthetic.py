"""Synthetic pictures follow from their index and keep apart what is held out; what is said of them holds."""

import dataclasses
import re

import numpy as np
import pytest

from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.data import questions, synthetic
from omnifusion_jax.data.questions import LANGUAGES, RU_PLACES, English, Russian
from omnifusion_jax.data.synthetic import COLOURS, PLACES, SHAPES, SIZE, SIZES, Scene, Thing
from omnifusion_jax.data.tokenizer import Tokenizer

MANY = 2000


def scenes(split, count=MANY):
    return [synthetic.scene_and_rng(i, split)[0] for i in range(count)]


# --- scenes


@pytest.mark.parametrize("split", synthetic.SPLITS)
def test_everything_follows_from_the_index(split):
    for i in (0, 7, 2**30 - 1):
        (scene, rng), (again, other) = synthetic.scene_and_rng(i, split), synthetic.scene_and_rng(i, split)
        assert scene == again
        assert (synthetic.render(scene, rng) == synthetic.render(again, other)).all()
        assert questions.questions(scene, rng, 3) == questions.questions(again, other, 3)
    assert len(set(scenes(split, 200))) > 195


def test_splits_and_held_out_combinations():
    def hidden(scene):
        return [synthetic.held_out(t.colour, t.shape, t.place) for t in scene.things]

    assert not any(any(hidden(scene)) for scene in scenes("train", 2 * MANY))
    assert all(any(hidden(scene)) for scene in scenes("held-out"))


def test_training_shows_every_colour_of_every_shape_and_all_places_but_one():
    for colour in COLOURS:
        for shape in SHAPES:
            assert sum(synthetic.held_out(colour, shape, place) for place in range(9)) == 1
    shown = {(t.colour, t.shape, t.place) for scene in scenes("train", 4 * MANY) for t in scene.things}
    assert {(colour, shape) for colour, shape, _ in shown} == {
        (colour, shape) for colour in COLOURS for shape in SHAPES
    }
    assert len(shown) == 8 * len(COLOURS) * len(SHAPES)


def test_scenes_are_well_formed():
    texts = set()
    for scene in scenes("train") + scenes("held-out"):
        places = [t.place for t in scene.things]
        assert 1 <= len(places) <= 4 and places == sorted(set(places)) and all(0 <= p < 9 for p in places)
        assert len(scene.text) <= 3 and set(scene.text) <= set(synthetic.CHARACTERS)
        assert not {3 * scene.row + column for column in range(len(scene.text))} & set(places)
        assert all(scene.at(t.place) == t for t in scene.things)
        assert [scene.at(3 * scene.row + column) for column in range(len(scene.text))] == list(scene.text)
        assert sum(scene.at(p) is not None for p in range(9)) == len(places) + len(scene.text)
        texts.add(scene.text)
    assert texts >= {"", *synthetic.WORDS} and any(text.isdigit() for text in texts)


# --- pictures


def test_a_picture_shows_its_scene():
    """The commonest hue of a place is the colour of what stands there; an empty one is dark."""
    for i in range(40):
        scene, rng = synthetic.scene_and_rng(i, "train")
        image = synthetic.render(scene, rng)
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        for place in range(9):
            y, x = 32 * (place // 3), 32 * (place % 3)
            pixels = image[y + 2 : y + 30, x + 2 : x + 30].reshape(-1, 3).astype(int)
            bright = pixels[pixels.max(axis=1) > 110]
            content = scene.at(place)
            if content is None:
                assert len(bright) < 20  # a neighbour's edge
            elif isinstance(content, Thing):
                middle = np.median(bright, axis=0)
                assert (
                    min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - middle).sum())
                    == content.colour
                )
            else:
                assert len(bright) > 10


def test_pictures_vary_where_the_scene_is_the_same():
    scene = Scene((Thing("large", "red", "circle", 4),))
    first, second = (synthetic.render(scene, np.random.default_rng(seed)) for seed in (0, 1))
    assert (first != second).any()


# --- pictures in words


def test_every_cell_word_is_one_token_of_the_bundled_tokenizer():
    tokenizer = Tokenizer(locate("omnifusion-tiny-decoder"))
    ids = [tokenizer.encode(word) for word in synthetic.CELL_WORDS]
    assert all(len(i) == 1 for i in ids) and len({i for (i,) in ids}) == len(synthetic.CELL_WORDS)
    assert len(set(synthetic.CELL_WORDS)) == 1 + 36 + len(SIZES) * len(COLOURS) * len(SHAPES)
    assert tokenizer.encode(" ".join(synthetic.CELL_WORDS)) == [i for (i,) in ids]


@pytest.mark.parametrize("side", [3, 6, 12])
def test_patch_words_are_a_map_of_the_scene(side):
    for scene in scenes("train", 100):
        words = synthetic.patch_words(scene, side)
        assert len(words) == side * side and set(words) <= set(synthetic.CELL_WORDS)
        for i, word in enumerate(words):
            row, column = 3 * (i // side) // side, 3 * (i % side) // side
            assert word == synthetic.cell_word(scene.at(3 * row + column))


def test_cell_words():
    assert synthetic.cell_word(Thing("large", "red", "circle", 0)) == "rC"
    assert synthetic.cell_word(Thing("small", "purple", "star", 0)) == "pa"
    assert [synthetic.cell_word(c) for c in (None, "k", "0", "9")] == ["empty", "k", "A", "J"]


# --- what is said: read back by other means than it was made by

WORDS = {  # every word for a property, in both languages
    **{name: name for name in (*COLOURS, *SHAPES, *SIZES)},
    **{form: name for name, forms in questions.RU_ADJECTIVES.items() for form in forms},
    **{nominative: shape for shape, (nominative, _, _) in questions.RU_SHAPES.items()},
    **{plural: shape for shape, (_, plural, _) in questions.RU_SHAPES.items()},
    **{f"{shape}s": shape for shape in SHAPES},
    "crosses": "cross",
}
PLACE_OF = {**{name: i for i, name in enumerate(PLACES)}, **{name: i for i, name in enumerate(RU_PLACES)}}


def described(text):
    """The properties that a text names: {"colour": "red", "shape": "circle"}"""
    names = [WORDS[word] for word in re.findall(r"\w+", text) if word in WORDS]
    kinds = {
        **dict.fromkeys(COLOURS, "colour"),
        **dict.fromkeys(SHAPES, "shape"),
        **dict.fromkeys(SIZES, "size"),
    }
    return {kinds[name]: name for name in names}


def fitting(scene, properties):
    return [t for t in scene.things if properties.items() <= dataclasses.asdict(t).items()]


def place_in(text):
    names = [name for name in PLACE_OF if re.search(rf"(^|\s){name}($|[\s?])", text)]
    return PLACE_OF[max(names, key=len)]


def check(scene, question, answer):
    """Whether the answer is true, by looking at the scene; returns the kind of question."""
    if question in ("How many shapes are there?", "Сколько здесь фигур?"):
        assert answer == str(len(scene.things))
        return "count"
    if question in ("What is written?", "Что написано?"):
        assert answer == (scene.text or {"W": "nothing", "Ч": "ничего"}[question[0]])
        return "written"
    if question.startswith(("How many", "Сколько")):
        assert answer == str(len(fitting(scene, described(question))))
        return "count of"
    if question.startswith(("Where", "Где")):
        (thing,) = fitting(scene, described(question))
        assert PLACE_OF[answer] == thing.place
        return "where"
    if question.startswith(("Is there", "Есть")):
        assert answer in ("yes", "no", "да", "нет") and (answer in ("yes", "да")) == bool(
            fitting(scene, described(question))
        )
        return "exists"
    if question.startswith(("What is at", "Что")):
        content = scene.at(place_in(question))
        assert (
            answer in ("nothing", "ничего")
            if content is None
            else content in fitting(scene, described(answer))
        )
        return "what at"
    (thing,) = fitting(
        scene, {k: v for k, v in described(question.removesuffix("small or large?")).items() if k != "size"}
    )
    (said,) = described(answer).items()
    assert dataclasses.asdict(thing)[said[0]] == said[1]
    asked = {
        "What colour": "colour",
        "Какого цвета": "colour",
        "What shape": "shape",
        "Какая фигура": "shape",
    }
    assert said[0] == next((kind for start, kind in asked.items() if question.startswith(start)), "size")
    return said[0]


def test_answers_are_true_and_as_many_as_asked():
    kinds, languages, answers = {}, {"en": 0, "ru": 0}, {}
    for i in range(1000):
        scene, rng = synthetic.scene_and_rng(i, synthetic.SPLITS[i % 2])
        number = 1 + i % 4
        asked = questions.questions(scene, rng, number)
        assert len(asked) == len({question for question, _ in asked}) == number
        for question, answer in asked:
            kind = check(scene, question, answer)
            kinds[kind] = kinds.get(kind, 0) + 1
            language = "en" if question.isascii() else "ru"
            assert answer.isascii() or language == "ru"
            languages[language] += 1
            answers.setdefault(kind, set()).add(answer)
    assert (
        set(kinds)
        == {"count", "written", "count of", "where", "exists", "what at", "colour", "shape", "size"}
        and min(kinds.values()) > 50
    )
    assert min(languages.values()) > 1000
    assert {"yes", "no", "да", "нет"} <= answers["exists"] and answers["where"] == set(PLACE_OF)


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_name_every_thing_and_the_text(language):
    for scene in scenes("train", 300):
        caption = questions.caption(scene, language)
        assert (language is English) == caption.isascii()
        *parts, last = caption.split(", ")
        says = last.startswith(("it says ", "написано "))
        assert says == bool(scene.text) and (not says or last.split()[-1] == scene.text)
        named = parts if says else [*parts, last]
        assert len(named) == len(scene.things)
        for part, thing in zip(named, scene.things, strict=True):
            assert (
                described(part) == {"size": thing.size, "colour": thing.colour, "shape": thing.shape}
                and place_in(part) == thing.place
            )


def test_articles_and_plurals():
    assert English.exists("orange", "ring") == "Is there an orange ring?"
    assert English.exists("red", "ring") == "Is there a red ring?"
    assert English.count_of("cross") == "How many crosses are there?"
    assert English.count_of("star") == "How many stars are there?"


def test_russian_adjectives_agree():
    assert [Russian.name("large", "blue", shape) for shape in ("circle", "star", "ring")] == [
        "большой синий круг",
        "большая синяя звезда",
        "большое синее кольцо",
    ]
    assert (
        Russian.count_of("star") == "Сколько здесь звёзд?"
        and Russian.shape_of("red") == "Какая фигура красная?"
    )
