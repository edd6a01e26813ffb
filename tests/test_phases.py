"""The two phases of training, in the paper's settings and in those of the published code, and what the second
takes from the first."""

import re
from pathlib import Path

import pytest
import tiny
from configs import pretrain, sft
from conftest import run_command
from settings import changed

from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.config import TrainConfig, adapter
from omnifusion_jax.errors import ConfigError

PAGE = Path(__file__).parents[1] / "docs/training.md"


def settings(c):
    return c.loss_mean_rows, c.optimizer.horizon, c.optimizer.clip, c.model.image.adapter.init, c.model.layout


def test_original_is_what_was_published():
    """4 rows a device (1 in phase 2) in a micro-batch, a schedule that counts the batches of 8 devices, no
    clipping, PyTorch's initialisation."""
    assert settings(pretrain.get_config("original").validate()) == (4, 8.0, None, "torch", "original")
    assert settings(sft.get_config("original").validate()) == (1, 8.0, None, "torch", "original")


def test_the_papers_variants_average_over_all_targets_and_do_not_clip():
    for phase in (pretrain, sft):
        assert settings(phase.get_config().validate()) == (0, 1.0, None, "normal", "omnifusion")


@pytest.mark.parametrize("name", ["", "original"])
def test_the_second_phase_starts_where_its_page_puts_the_first(name):
    """And with its model."""
    command = rf"--config=configs/pretrain\.py{name and ':' + name} [^\n]*--workdir=(\S+)"
    workdirs = re.findall(command, PAGE.read_text(encoding="utf-8").replace("\\\n", " "))
    first, second = pretrain.get_config(name), sft.get_config(name)
    assert second.init_from in [f"{workdir}/model" for workdir in workdirs]
    assert second.init_from == {"": "runs/pretrain/model", "original": "runs/pretrain-original/model"}[name]
    assert second.model == first.model


@pytest.mark.parametrize(("field", "value"), [("batch_size", 30), ("loss_mean_rows", -1)])
def test_rows_of_a_mean_that_do_not_divide_a_batch_are_refused(field, value):
    config = pretrain.get_config("original")
    setattr(config, field, value)
    config.grad_accum = 1
    with pytest.raises(ConfigError, match="not a multiple of loss_mean_rows"):
        config.validate()


def test_how_an_adapter_was_first_drawn_and_its_dropout_are_free_its_kind_is_not(tmp_path):
    from omnifusion_jax.run import starting_point

    c = tiny.config()
    save_native(
        tmp_path / "model",
        c,
        tiny.arrays(c, "image/adapter", "special"),
        Path(locate("omnifusion-tiny-decoder")),
    )
    free = changed(c, {"image.adapter.init": "torch", "image.adapter.dropout": 0.3})
    config = TrainConfig(model=free, init_from=str(tmp_path / "model"))
    assert "image/adapter/layer/attention/query/kernel" in starting_point(config)[0]
    config.model.image.adapter = adapter("linear")
    joins = "--config.model.image.adapter"
    taken = f"{joins}.kind=transformer {joins}.heads=2 {joins}.mlp=48"
    # settings that the other kind does not have are among them
    with pytest.raises(ConfigError, match=re.escape(taken)):
        starting_point(config)


def test_train_takes_over_what_the_command_line_sets_beside_a_preset(tmp_path):
    """kind=transformer is what the old preset had; with the new one's two encoders it cannot work, and must
    be seen to be refused."""
    flags = "--config.model.preset=report-sum-mistral-7b", "--config.model.image.adapter.kind=transformer"
    said = run_command(
        "train", "--config=configs/pretrain.py", *flags, f"--workdir={tmp_path / 'run'}", fails=True
    )
    assert "adapter.kind 'transformer' takes 1 of the encoders, there are 2" in said
