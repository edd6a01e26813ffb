"""How well a bare encoder names what stands where."""

from omnifusion_jax.data import synthetic
from omnifusion_jax.evaluation.patches import patch_accuracy
from omnifusion_jax.models.patch_reader import PatchReader
from omnifusion_jax.models.presets import preset
from omnifusion_jax.nn import nnx


def test_pictures_are_those_that_training_never_shows(monkeypatch):
    drawn, draw = [], synthetic.scene_and_rng
    monkeypatch.setattr(
        synthetic, "scene_and_rng", lambda i, split: drawn.append((i, split)) or draw(i, split)
    )
    c = preset("omnifusion-tiny")
    figures = patch_accuracy(c, nnx.parameters(PatchReader(c, 121, rngs=nnx.Rngs(0))), 5, batch_size=2)
    assert drawn == [(i, "held-out") for i in range(5)]
    assert (
        figures["pictures"] == 5 and 0 <= figures["accuracy"] < 0.5
    )  # of an encoder that has learned nothing
