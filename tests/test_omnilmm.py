"""The original's interface: a picture in base64, a dialogue in JSON."""

import base64
import io
import json

import numpy as np
import omnilmm_models as published
import pytest
from PIL import Image

import omnifusion_jax as of
from omnifusion_jax.config.generation import RECIPES
from omnifusion_jax.errors import ConfigError, DataError

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
SHORT = of.GenerationConfig(max_new_tokens=8)
TALK = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A red circle"},
    {"role": "user", "content": "Где круг?"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("omnilmm")
    published.save(published.Whole("omnilmm"), directory)
    return of.load(directory, dtype="float32")


def encoded(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_an_answer_is_that_of_the_request(model):
    chat = of.OmniLMMChat(model, SHORT)
    said = chat.chat({"image": encoded(PICTURE), "question": json.dumps(TALK)})
    assert said == model.generate(of.Request(TALK, [PICTURE]), SHORT)[0].text.strip()
    assert said == chat.process({"image": encoded(PICTURE), "question": json.dumps(TALK)})
    lines = base64.encodebytes(base64.b64decode(encoded(PICTURE))).decode()
    named = [{"from": "human" if t["role"] == "user" else "gpt", "value": t["content"]} for t in TALK]
    assert "\n" in lines[:-1]
    assert said == chat.chat({"image": lines, "question": json.dumps(named)})
    alone = chat.chat({"image": "", "question": json.dumps(TALK)})
    assert alone == model.generate(of.Request(TALK), SHORT)[0].text.strip()


@pytest.mark.parametrize("image", ["bm8gcGljdHVyZQ==", "%%%", "Я", 3])
def test_bytes_that_are_no_picture(model, image):
    assert (
        of.OmniLMMChat(model, SHORT).chat({"image": image, "question": json.dumps(TALK)})
        == "Image decode error"
    )


def test_a_question_that_is_no_dialogue(model):
    for given in ({"question": "What?"}, {}, {"question": None}):
        with pytest.raises(DataError, match="the question is no JSON"):
            of.OmniLMMChat(model, SHORT).chat(given)
    with pytest.raises(DataError, match="messages"):
        of.OmniLMMChat(model, SHORT).chat({"question": '{"role": "user"}'})
    told = json.dumps([{"role": "user", "content": "What is <im_patch>?"}])
    with pytest.raises(DataError, match="Remove <im_patch> from the text of its turns"):
        of.OmniLMMChat(model, SHORT).chat({"image": encoded(PICTURE), "question": told})


OWN = {  # max_new_tokens, num_beams, temperature, top_k, top_p, repetition_penalty
    "omnilmm": (1024, 1, 0.6, 30, 0.9, 1.1),
    "minicpm-v-1.0": (2048, 3, 0.0, 0, 1.0, 1.2),
    "minicpm-v-2.0": (1024, 1, 0.7, 100, 0.8, 1.05),
}


@pytest.mark.parametrize("name", OWN)
def test_a_model_answers_by_its_own_recipe(name, tmp_path):
    published.save(published.Whole(name), tmp_path)
    g = of.OmniLMMChat(tmp_path, dtype="float32").generation
    drawn = g.temperature, g.top_k, g.top_p
    assert (g.max_new_tokens, g.num_beams, *drawn, g.repetition_penalty) == OWN[name]


def test_recipes_by_name():
    for name in RECIPES:
        of.GenerationConfig.named(name)
    assert of.GenerationConfig.named("omnifusion-1.1") == of.GenerationConfig.official()
    beams = of.GenerationConfig.named("minicpm-v-1.0")
    assert (beams.num_beams, beams.repetition_penalty, beams.temperature) == (3, 1.2, 0)
    drawn = of.GenerationConfig.named("minicpm-v-2.0")
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.repetition_penalty) == (0.7, 0.8, 100, 1.05)
    with pytest.raises(
        ConfigError, match=r"the name of a recipe is 'other'; choose from omnifusion-1.1, omnilmm"
    ):
        of.GenerationConfig.named("other")
