"""Dialogues about pictures drawn on the fly."""

from omnifusion_jax.data import questions, synthetic
from omnifusion_jax.data.dialogues import IMAGE, Dialogue, Media
from omnifusion_jax.data.sources.base import ENDLESS
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import SOURCES


def captions(scene, rng):
    language = questions.LANGUAGES[rng.integers(2)]
    return [(language.describe, questions.caption(scene, language))]


def several_questions(scene, rng):
    return questions.questions(scene, rng, int(rng.integers(1, 5)))


def one_question(scene, rng):
    return questions.questions(scene, rng, 1)


def anything(scene, rng):
    return captions(scene, rng) if rng.random() < 0.2 else several_questions(scene, rng)


# kind -> (split, what is said, whether a map in words replaces the picture)
SYNTHETIC = {
    "captions": ("train", captions, False),
    "questions": ("train", several_questions, False),
    "text": ("train", anything, True),
    "held-out": ("held-out", one_question, False),
    "held-out-text": ("held-out", one_question, True),
}


class SyntheticSource:
    """Dialogues about pictures drawn on the fly, of a kind in SYNTHETIC.

    `side` is the number of patches a side, for maps in words. Raises DataError for an unknown kind.
    """

    def __init__(self, kind: str, side: int):
        if kind not in SYNTHETIC:
            raise DataError(f"there is no synthetic:{kind}; choose from {', '.join(SYNTHETIC)}")
        self.kind, self.side, self.fingerprint = kind, side, f"synthetic:{kind}"
        self.split, self.say, self.in_words = SYNTHETIC[kind]

    def __len__(self):
        return ENDLESS

    def __getitem__(self, i: int) -> Dialogue:
        scene, rng = synthetic.scene_and_rng(i, self.split)
        turns = []
        for question, answer in self.say(scene, rng):
            turns += [("user", question), ("assistant", answer)]
        if self.in_words:
            turns[0] = ("user", " ".join([*synthetic.patch_words(scene, self.side), turns[0][1]]))
        media = () if self.in_words else (Media(IMAGE, synthetic.render(scene, rng)),)
        return Dialogue(f"synthetic:{self.kind}[{i}]", tuple(turns), media)


@SOURCES.row("synthetic")
def synthetic_source(path: str, images: str, side: int) -> SyntheticSource:
    return SyntheticSource(path, side)
