"""Which settings may change when a run goes on, and that no other one does without a word."""

import dataclasses
import json

import jax
import pytest

from omnifusion_jax.config import DataConfig, ModelConfig, TrainConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.training.resume import (
    compare,
    differences,
    meaning,
    same_data,
    same_reading,
    same_versions,
    versions,
    write_config,
)
from omnifusion_jax.training.workdir import locked


def changed(**fields):
    """A config with fields given as a__b=value."""
    c = TrainConfig(data=DataConfig(path="a.json"), train_parts=((".*", 1.0),))
    for name, value in fields.items():
        *parents, last = name.split("__")
        at = c
        for parent in parents:
            at = at[int(parent)] if parent.isdigit() else getattr(at, parent)
        assert hasattr(at, last)
        setattr(at, last, value)
    return c


def resume(tmp_path, now, newest=5, allow_change=False):
    write_config(changed(), tmp_path)
    compare(now, tmp_path, newest, allow_change)


MEANT = {
    "batch_size": 32,
    "steps": 2000,
    "seed": 1,
    "grad_accum": 2,
    "compute_dtype": "float32",
    "train_parts": ((".*", None),),
    "init_from": "other",
    "optimizer__learning_rate": 1.0,
    "optimizer__schedule": "constant",
    "optimizer__moments": "int8",
    "lora__rank": 8,
    "lora__alpha": 8.0,
    "lora__base": "int8",
    "data__path": "b.json",
    "data__images": "elsewhere",
    "data__max_length": 100,
    "data__shuffle": False,
    "model__layout": "text",
    "model__prompt": "Hi.\n",
    "model__image__fit": "pad",
    "model__image__adapter__dropout": 0.0,
    "model__image__encoders__0__patch": 16,
}
FREE = {
    "mesh__fsdp": 8,
    "checkpoint__every_steps": 7,
    "checkpoint__every_minutes": 10.0,
    "checkpoint__final": "complete",
    "eval__path": "b.json",
    "log_every": 1,
    "max_bad_steps": 3,
    "remat": "full",
    "data__num_workers": 4,
    "data__on_bad_sample": "skip",
}


@pytest.mark.parametrize("name", MEANT)
def test_a_setting_that_changes_the_meaning_is_refused_or_said(tmp_path, name, capsys):
    now = changed(**{name: MEANT[name]})
    row = f"\n  {name.replace('__', '.')}: "
    with pytest.raises(ConfigError, match="then -> now") as caught:
        resume(tmp_path, now)
    assert (
        row in str(caught.value)
        and str(caught.value).count(" -> ") == 2
        and "--allow_change" in str(caught.value)
    )
    resume(tmp_path, now, allow_change=True)
    assert row in capsys.readouterr().out


def test_all_of_them_are_listed_with_both_values(tmp_path):
    with pytest.raises(ConfigError) as caught:
        resume(tmp_path, changed(batch_size=32, data__path="b.json", log_every=1))
    assert "\n  batch_size: 256 -> 32\n  data.path: 'a.json' -> 'b.json'\n" in str(
        caught.value
    ) and "log_every" not in str(caught.value)


@pytest.mark.parametrize("name", FREE)
def test_a_setting_that_does_not_may_change(tmp_path, name, capsys):
    resume(tmp_path, changed(**{name: FREE[name]}))
    assert capsys.readouterr().out == ""


def test_a_field_that_nobody_has_thought_of_is_guarded():
    """New ones count as what their default says; those that are gone count."""
    then, now, default = (
        {"a": {"old": 1, "b": 2}},
        {"a": {"b": 2, "new": 3, "newer": 4}},
        {"a": {"b": 0, "new": 3, "newer": 5}},
    )
    assert meaning(differences(then, now, default)) == [("a.old", 1, "(no such field)"), ("a.newer", 5, 4)]


def test_fewer_steps_than_are_done(tmp_path):
    with pytest.raises(ConfigError, match="at step 5 already, steps is 4"):
        resume(tmp_path, changed(steps=4), allow_change=True)


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path, capsys):
    resume(tmp_path, changed(batch_size=32), newest=None)
    assert "there is nothing to resume, the run starts from the beginning" in capsys.readouterr().out
    compare(changed(), tmp_path / "new", None, False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", [None, '{"steps": 10'])
def test_a_config_that_cannot_be_compared(tmp_path, text, capsys):
    if text:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json cannot be read .* --allow_change"):
        compare(changed(), tmp_path, 5, False)
    compare(changed(), tmp_path, 5, True)
    assert "uncompared" in capsys.readouterr().out


def test_another_number_of_records(capsys):
    then, now = {"records": 24, "content": "a", "seen": 7}, {"records": 30, "content": "b", "seen": 0}
    same_data(then, then | {"seen": 0}, False)
    with pytest.raises(
        ConfigError,
        match="had 24 records when the run was saved, now it has 30: its place in the data is lost",
    ):
        same_data(then, now, False)
    same_data(then, now, True)
    assert "had 24 records" in capsys.readouterr().out


def test_a_data_file_that_was_edited_in_place(capsys):
    then, now = ({"records": 24, "content": content} for content in "ab")
    said = r"as many records as when the run was saved, 24, but its file \(data\.path\) says something else"
    with pytest.raises(ConfigError, match=said):
        same_data(then, now, False)
    same_data(then, now, True)
    assert "goes on with what the file says now" in capsys.readouterr().out


def test_other_libraries_are_said(capsys):
    same_versions(versions())
    assert capsys.readouterr().out == ""
    same_versions({**versions(), "jax": "0.1.2"})
    said = capsys.readouterr().out
    assert f"\n  jax: '0.1.2' -> '{jax.__version__}'\n" in said and said.count(" -> ") == 2


def test_phase_2_reads_as_phase_1_did(capsys):
    theirs, ours = ModelConfig(), ModelConfig(layout="original", prompt="It's\n")
    ours.image.fit = "pad"
    ours.image.encoders = (dataclasses.replace(ours.image.encoders[0], image_size=448),)  # compared elsewhere
    same_reading(theirs, ModelConfig(), "phase1", False)
    with pytest.raises(ConfigError) as caught:
        same_reading(ours, theirs, "phase1", False)
    said = str(caught.value)
    assert "\n  model.layout: 'omnifusion' -> 'original'" in said and "encoder" not in said
    settings = (
        "--config.model.layout=omnifusion '--config.model.prompt=This is a dialog with AI assistant.\n' "
        "--config.model.image.fit=crop"
    )
    assert settings in said
    same_reading(ours, theirs, "phase1", True)
    assert "model.image.fit: 'crop' -> 'pad'" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["layout", "image_place", "prompt", "user", "bot", "template"])
def test_each_setting_of_how_a_dialogue_is_read_is_compared(field):
    other = dataclasses.replace(ModelConfig(), **{field: "mark"})
    with pytest.raises(ConfigError, match=rf"model\.{field}: .*'mark'"):
        same_reading(ModelConfig(), other, "phase1", False)


def test_the_config_stands_in_the_workdir_whole(tmp_path):
    write_config(changed(batch_size=32), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 32


def test_one_run_at_a_time(tmp_path):
    refused = pytest.raises(ConfigError, match=r"run is in use by process \d+ on .*another --workdir")
    with locked(tmp_path / "run"), refused, locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):  # the file that is still there does not hold it
        pass
    refused = pytest.raises(ConfigError, match=r"run/lock is a file\. Give a folder")
    with refused, locked(tmp_path / "run" / "lock"):
        pass
