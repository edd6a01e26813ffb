"""LLaVA checkpoints: read, generated from, written, read again; and what is refused."""

from pathlib import Path

import llava_models as lm
import pytest
from PIL import Image

import omnifusion_jax as of

PICTURES = Path(__file__).parents[2].parent / "shared/data/real_dialogues/images"
QUESTIONS = ("What is in the picture?", "How many circles are there?", "Where is the blue square: left or right?", "A", "Why?\nSay it.")


def shown():
    """A real picture where there are some, and drawn ones of several shapes."""
    real = [Image.open(file).convert("RGB") for file in sorted(PICTURES.glob("*.jpg"))[:2]]
    return [*real, *lm.pictures((24, 24), (50, 31), (30, 64), (70, 20))]


def requests():
    """With and without a picture, of unequal lengths, one of several turns."""
    found = [of.Request([{"role": "user", "content": text}], images=[picture]) for text, picture in zip(QUESTIONS * 2, shown(), strict=False)]
    found += [of.Request([{"role": "user", "content": text}]) for text in QUESTIONS[:2]]
    turns = [("user", "What is it?"), ("assistant", "A red circle."), ("user", "Where?")]
    return [*found, of.Request([{"role": role, "content": text} for role, text in turns], images=shown()[:1])]


def agree(directory, model, processor, asked=None, **settings):
    """Asserts equal tokens: all in one batch of theirs, greedily and by beams."""
    ours = of.load(directory)
    asked = asked or requests()
    lengths = set()
    for beams in (1, 3):
        theirs = lm.generate(model, processor, asked, num_beams=beams, **settings)
        assert [a.tokens for a in ours.generate(asked, of.GenerationConfig(max_new_tokens=24, num_beams=beams))] == theirs
        lengths |= {len(tokens) for tokens in theirs}
    assert len(lengths) > 1
    return ours


@pytest.mark.parametrize(
    ("kind", "decoder", "template"),
    [
        ("llava", "llama", "llava-1.5"),
        ("llava", "mistral", "llava-1.5"),
        ("llava_next", "mistral", "llava-next-mistral"),
        ("llava_next", "llama", "llava-1.5"),
    ],
)
def test_tokens_are_those_of_transformers(tmp_path, kind, decoder, template):
    agree(tmp_path, *lm.build(tmp_path, kind, decoder, template))
