"""The program of a run is made as its config says."""

import jax.numpy as jnp
import pytest
from runs import config

from omnifusion_jax import sharding
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.training import program


@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
def test_every_setting_of_the_step_is_that_of_the_config(monkeypatch, grad_dtype):
    given = {}
    monkeypatch.setattr(program, "make_step", lambda *_, **settings: given.update(settings) or (lambda s: s))
    settings = {"seed": 5, "grad_accum": 2, "remat": "dots", "loss_mean_rows": 8}
    c = config(compute_dtype="bfloat16", grad_dtype=grad_dtype, **settings)
    program.make_program(c, sharding.make_mesh(**vars(c.mesh)))
    assert given.items() >= settings.items()
    assert (given["dtype"], given["grad_dtype"]) == (jnp.bfloat16, jnp.dtype(grad_dtype))


def test_a_part_that_could_not_be_written_is_refused_before_the_first_step():
    frozen = r"image/encoders/.*|decoder/(?!embed).*"
    c = config(train_parts=((r"image/adapter/.*|special/.*|decoder/embed", 1.0), (frozen, None)))
    with pytest.raises(ConfigError, match=r"trains decoder in part, .*Set checkpoint\.final=complete"):
        program.make_program(c, sharding.make_mesh(**vars(c.mesh)))
