"""Answers from a model that is spread over eight devices: pictures and cache are cut into pieces, not copied,
and the tokens stay the same.
"""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from omnifusion_jax import sharding
from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.inference.engine import programs
from omnifusion_jax.inference.fingerprint import fingerprint
from omnifusion_jax.inference.model import Model
from omnifusion_jax.models.axes import axes

SETTINGS = {
    "sampled": GenerationConfig(max_new_tokens=6, temperature=1.0, seed=1),
    "beams": GenerationConfig(max_new_tokens=6, num_beams=2),
}
ROWS, HEADS = ("data", "fsdp"), "tensor"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(on one device, on eight)"""
    tokenizer, arrays, mesh = (
        tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer")),
        tiny.arrays(tiny.shallow()),
        sharding.make_mesh(2, 2, 2),
    )
    spread = {
        path: jax.device_put(a, sharding.sharding(mesh, axes(path), a.shape)) for path, a in arrays.items()
    }
    return Model(tiny.shallow(), arrays, tokenizer), Model(tiny.shallow(), spread, tokenizer)


@pytest.fixture(scope="module")
def asked():
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    return [
        Request([{"role": "user", "content": text}], [picture], id=text)
        for text in ("What is it?", "Left", "How many?")
    ]


@pytest.mark.parametrize("name", SETTINGS)
def test_cache_and_pictures_are_spread_and_the_tokens_are_equal(models, asked, name, monkeypatch):
    one, many = models
    seen = {}

    def watch(stage):
        program = getattr(programs, stage)

        def run(*args, **settings):
            seen[stage] = program(*args, **settings)
            return seen[stage]

        monkeypatch.setattr(programs, stage, run)

    expected = one.generate(asked, SETTINGS[name], batch_size=1)
    for stage in ("encode", "extend", "advance"):
        watch(stage)
    found = many.generate(asked, SETTINGS[name], batch_size=4)
    assert [a.tokens for a in found] == [a.tokens for a in expected]
    state, report = seen["advance"]
    for a in state.cache[0]:
        assert a.sharding.spec[:2] == (ROWS, HEADS)
        assert a.shape[:2] == (4, 2) and {s.data.shape[:2] for s in a.addressable_shards} == {(1, 1)}
    assert all(a.is_fully_replicated for a in jax.tree.leaves(report))


def test_a_row_for_every_piece(models, asked):
    """Fewer requests than devices: rows that nobody is in say nothing."""
    one, many = models
    assert (
        many.generate(asked[0], SETTINGS["sampled"])[0].tokens
        == one.generate(asked[0], SETTINGS["sampled"])[0].tokens
    )
    assert (
        "".join(many.stream(asked[0], SETTINGS["sampled"]))
        == one.generate(asked[0], SETTINGS["sampled"])[0].text
    )
    np.testing.assert_allclose(many.logits(asked[0])[0], one.logits(asked[0])[0], atol=1e-4)


def test_eight_bits_beams_and_forms(models, asked):
    """Together, so that programs are compiled once: a cache of integers, which beams reorder, and a form."""
    free = GenerationConfig(max_new_tokens=8, num_beams=2)
    settings = (free, dataclasses.replace(free, choices=("red circle", "two", "7", "q")))
    found = []
    for model in models:
        engine = model.engine(slots=8, length=128, largest=free, cache="int8")
        handles = [engine.submit(request, g) for g in settings for request in asked]
        found.append([handle.result().tokens for handle in handles])
    assert found[0] == found[1] and len({tuple(tokens) for tokens in found[0]}) > 4
    keys, _ = engine.scheduler.device.state.cache[0]
    assert all(a.sharding.spec[:2] == (ROWS, HEADS) for a in keys) and keys.values.dtype == np.int8


def test_scores(models, asked):
    candidates = ["A red circle", "red", "There are two"]
    one, many = ([score.logprob for score in m.score(asked[0], candidates, batch_size=2)] for m in models)
    np.testing.assert_allclose(many, one, atol=1e-3)


def test_one_device_has_no_mesh_and_the_fingerprint_is_the_same(models):
    assert fingerprint(models[0]) == fingerprint(models[1])
    assert models[0].mesh is None and dict(models[1].mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
