"""What is typed: names and files of configs, values of fields, and the line that says what is wrong."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
from absl import flags

from omnifusion_jax import __main__, shipped
from omnifusion_jax.changes import changes
from omnifusion_jax.cli import command
from omnifusion_jax.cli.help import page
from omnifusion_jax.cli.overrides import ConfigFlags, GenerationFlags, MeshFlags
from omnifusion_jax.config import GenerationConfig, RopeScaling, adapter
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.fields import differences
from omnifusion_jax.models.presets import preset

ROOT = Path(__file__).parents[1]
mesh = lambda _: MeshFlags()  # it has no flag but those of its fields


def typed(kind, *arguments):
    """The value of such flags after these words of a command line."""
    here = flags.FlagValues()
    section = kind(here)
    command.parsed(["train", *arguments], list(here), [section], here)
    return section.value


def config(*arguments):
    return typed(ConfigFlags, *arguments)


def said(kind, *arguments):
    """The line that a wrong command line ends with."""
    with pytest.raises((SystemExit, ConfigError)) as caught:
        typed(kind, *arguments)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


# --- which config


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path or ".").resolve() != ROOT])
    return tmp_path


def test_shipped_configs_have_names():
    assert shipped.names() == [
        "dpo",
        "minicpmv",
        "omnilmm",
        "pretrain",
        "report/mixture",
        "report/table4",
        "report/table5",
        "report/table6",
        "sft",
        "sft_lora",
        "tiny",
    ]


@pytest.mark.parametrize("source", ["sft:original", str(ROOT / "configs/sft.py:original")])
def test_a_config_is_found_from_anywhere(elsewhere, source):
    found = config(f"--config={source}")
    assert found.optimizer.name == "adafactor" and found.init_from


@pytest.mark.parametrize(
    "source", ["report/table4:internvit-6b,sft", str(ROOT / "configs/report/table4.py:internvit-6b,sft")]
)
def test_a_config_that_imports_others_is_found_from_anywhere(elsewhere, source):
    assert config(f"--config={source}").model == preset("report-internvit-6b-mistral-7b")


def test_a_file_of_ones_own(elsewhere):
    text = (
        "from omnifusion_jax.shipped import tiny\n\n"
        "def get_config(name='sft'):\n    c = tiny.get_config(name)\n    c.steps = 7\n    return c\n"
    )
    (elsewhere / "mine.py").write_text(text)
    assert config("--config=mine.py").steps == config("--config=./mine.py:sft").steps == 7
    assert config("--config=mine.py:pretrain", "--config.steps=8").steps == 8


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "stf",
            [
                "there is no config 'stf': shipped with the package are dpo, minicpmv, omnilmm, pretrain,",
                "its path, which ends in .py",
            ],
        ),
        ("configs/nowhere.py", ["configs/nowhere.py does not exist: shipped with the package are dpo,"]),
        ("report", ["there is no config 'report'"]),
        ("tiny:nope", ["no variant 'nope'; choose from real, encoder"]),
    ],
)
def test_a_config_that_is_not_there(source, words):
    message = said(ConfigFlags, f"--config={source}")
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "c.optimizer.learning_rat = 1",
            (
                "mine.py sets optimizer.learning_rat, which is no field of TrainConfig: "
                "is optimizer.learning_rate meant?"
            ),
        ),
        (
            "c = type(c)(stepz=1)",
            "mine.py, line 5: TypeError: TrainConfig.__init__() got an unexpected keyword argument 'stepz'",
        ),
        ("c = (", "mine.py, line 5: SyntaxError: '(' was never closed (mine.py, line 5)"),
        ("c = {}", "mine.py: get_config gives dict, a TrainConfig is expected"),
        ("import nowhere_at_all", "mine.py, line 5: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ],
)
def test_what_is_wrong_in_a_config_file(elsewhere, line, message):
    (elsewhere / "mine.py").write_text(
        "from omnifusion_jax.config import TrainConfig\n\n"
        f"def get_config():\n    c = TrainConfig()\n    {line}\n    return c\n"
    )
    assert said(ConfigFlags, "--config=mine.py") == f"error: {message}"


# --- which values


def test_values_of_fields():
    found = config(
        "--config.optimizer.clip=None",  # before --config, or after it
        "--config=tiny:sft",
        "--config.init_from=",
        "--config.parts_from.image/encoders/0=None",
        "--config.parts_from.decoder=mine",
        "--config.model.decoder.window=None",
        "--config.model.image.encoders.0.shortest_edge=128",
        "--noconfig.data.shuffle",
        "--config.eval.blind=false",
        "--config.steps",
        "5",
        "--config.model.prompt=Two\nlines.\n",
        "--config.train_parts=[['image/adapter/.*', 0.5], ['(special|image/encoders|decoder)/.*', None]]",
    )
    assert (found.optimizer.clip, found.init_from, found.model.decoder.window) == (None, None, None)
    assert found.parts_from == {"decoder": "mine"}
    assert (
        found.model.image.encoders[0].shortest_edge == 128
        and not found.data.shuffle
        and not found.eval.blind
        and found.steps == 5
    )
    assert found.train_parts == (("image/adapter/.*", 0.5), ("(special|image/encoders|decoder)/.*", None))
    assert found.batch_size == 64 and found.model.prompt == "Two\nlines.\n"  # the former of the file
    assert isinstance(config("--config=tiny:sft", "--config.optimizer.clip=2").optimizer.clip, float)
    scaling = config(
        "--config=tiny",
        "--config.model.decoder.rope_scaling.factor=4",
        "--config.model.decoder.rope_scaling=build",
    )
    assert scaling.model.decoder.rope_scaling == RopeScaling(factor=4.0)
    assert config("--config=tiny:sft").model.decoder.window == 4096


def test_a_later_command_line_starts_anew():
    section = ConfigFlags(flags.FlagValues())
    assert section.take(["train", "--config.steps=7", "--workdir=x"]) == ["train", "--workdir=x"]
    section.take(["train", "--config.seed=1"])
    assert section.given == {"seed": 1}


def test_flags_in_a_file(tmp_path):
    file = tmp_path / "flags"
    file.write_text("--config=tiny:sft\n--config.steps=7\n--config.optimizer.clip=None\n")
    found = config(f"--flagfile={file}", "--config.batch_size=3")
    assert (found.steps, found.batch_size, found.optimizer.clip) == (7, 3, None)


def test_another_preset_is_followed_before_other_fields_are_set():
    """Whatever their order, and although the kind is that of the old preset."""
    found = config(
        "--config.model.image.adapter.kind=transformer",
        "--config=sft:original",
        "--config.model.preset=llava-1.5-7b",
    ).model
    expected = preset("llava-1.5-7b")
    assert expected.image.adapter.kind == "mlp" and expected.layout == "template"
    assert (found.preset, found.image.adapter.kind, found.decoder) == (
        "llava-1.5-7b",
        "transformer",
        expected.decoder,
    )
    assert found.layout == "original"  # of the file


KIND = "--config.model.image.adapter.kind="


@pytest.mark.parametrize("turn", [1, -1], ids=["kind first", "kind last"])
def test_another_kind_of_adapter_brings_its_own_settings(turn):
    """Settings typed beside it are of the new kind, whatever their order.

    The file's changes stay where it has such a field.
    """
    joins = lambda *words: config(*words[::turn], "--config=sft:original").model.image.adapter
    assert joins() == adapter("transformer", init="torch")  # as the file has it
    assert joins(f"{KIND}mlp", "--config.model.image.adapter.activation=gelu_tanh") == adapter(
        "mlp", init="torch", activation="gelu_tanh"
    )
    assert joins(
        f"{KIND}resampler",
        "--config.model.image.adapter.init=normal",
        "--config.model.image.adapter.queries=16",
    ) == adapter("resampler", queries=16)
    found = config("--config=tiny", f"{KIND}mlp").model.image.adapter
    assert found == adapter("mlp", mlp=256)  # which the tiny preset has otherwise than by default
    assert config("--config=tiny").model.image.adapter == adapter("transformer", mlp=256)  # nothing is shared


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--config.model.image.adapter.activation=gelu"],
            "it goes with --config.model.image.adapter.kind=mlp or --config.model.image.adapter.kind=",
        ),
        (
            ["--config.model.image.adapter.queries=4"],
            "there is no flag --config.model.image.adapter.queries; it goes with "
            "--config.model.image.adapter.kind=attention or --config.model.image.adapter.kind=resampler",
        ),
        (
            [f"{KIND}linear", "--config.model.image.adapter.dropout=0.2"],
            "it goes with --config.model.image.adapter.kind=transformer or ",
        ),
        (
            ["--config.model.image.adapter.heads=2", f"{KIND}mlp"],
            "it goes with --config.model.image.adapter.kind=transformer or ",
        ),
        (
            [f"{KIND}resampler", "--config.model.image.adapter.querie=4"],
            "is --config.model.image.adapter.queries meant?",
        ),
    ],
)
def test_a_field_of_another_kind_of_adapter_is_no_flag(words, message):
    assert message in said(ConfigFlags, "--config=tiny", *words)


def test_encoders_are_numbered():
    found = config(
        "--config=tiny", "--config.model.image.encoders.0.image_size=128", "--config.model.image.fit=squash"
    ).model.image
    assert ([encoder.image_size for encoder in found.encoders], found.fit) == ([128], "squash")
    two = config(
        "--config=report/table5:sum", "--config.model.image.encoders.1.feature_layer=-1"
    ).model.image.encoders
    assert [encoder.feature_layer for encoder in two] == [-2, -1]
    assert config("--config=tiny").model.image.encoders[0].image_size == 96


def test_where_parts_come_from():
    stored = {"image/encoders/0": "omnifusion-tiny-encoder", "decoder": "omnifusion-tiny-decoder"}
    assert config("--config=tiny:sft").parts_from == stored
    assert config("--config=tiny:sft", "--config.parts_from.decoder=mine").parts_from == stored | {
        "decoder": "mine"
    }
    both = config(
        "--config=tiny:sft",
        "--config.parts_from.image/encoders/1=it",
        "--config.parts_from.image/encoders/0=",
    )
    assert both.parts_from == {"image/encoders/1": "it", "decoder": stored["decoder"]}
    assert config("--config=tiny:sft", "--config.parts_from={}").parts_from == {}
    assert config(
        "--config=tiny:sft", "--config.parts_from.decoder=it", "--config.parts_from={}"
    ).parts_from == {"decoder": "it"}
    assert config("--config=tiny:sft", "--config.parts_from={'decoder': 'it'}").parts_from == {
        "decoder": "it"
    }
    assert config("--config=tiny:sft").parts_from == stored  # nothing is shared


def test_generation_starts_from_the_recipe():
    assert typed(GenerationFlags) == GenerationConfig()
    assert typed(GenerationFlags, "--generation.official") == GenerationConfig.official()
    found = typed(
        GenerationFlags,
        "--generation.official",
        "--generation.banned=['a', '\\n']",
        "--generation.forced_eos=false",
    )
    assert (found.banned, found.forced_eos, found.num_beams) == (("a", "\n"), False, 3)
    assert typed(GenerationFlags, "--generation.banned_tokens=[[1, 2], [3]]").banned_tokens == ((1, 2), (3,))


def test_a_mesh():
    assert typed(mesh) is None
    assert typed(mesh, "--mesh.tensor=2", "--mesh.fsdp=-1").shape == {
        "data": 1,
        "fsdp": 4,
        "tensor": 2,
    }  # of eight devices


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config.nonsense=1", "there is no flag --config.nonsense; --help lists those there are"),
        (
            "--config.optimizer.learning_rat=1",
            "there is no flag --config.optimizer.learning_rat; is --config.optimizer.learning_rate meant?",
        ),
        ("--config.learning_rate=1", "is --config.optimizer.learning_rate meant?"),
        ("--config.mesh.xyz=1", "there is no flag --config.mesh.xyz; --help lists those there are"),
        ("--config.mesh=1", "there is no flag --config.mesh; --help lists those there are"),
        ("--xyz=1", "there is no flag --xyz; --help lists those there are"),
        ("--noconfig.data.shuffel", "is --config.data.shuffle meant?"),
        ("--confg=tiny", "is --config meant?"),
        ("--config.steps=abc", "--config.steps=abc: a whole number is expected"),
        ("--config.steps=1.5", "--config.steps=1.5: a whole number is expected"),
        ("--config.steps=None", "--config.steps=None: a whole number is expected"),
        (
            "--config.model.decoder.window=x",
            "--config.model.decoder.window=x: a whole number or None is expected",
        ),
        ("--config.data.path=None", "--config.data.path=None: text is expected"),
        ("--config.data.shuffle=2", "--config.data.shuffle=2: true or false is expected"),
        (
            "--noconfig.data.shuffle=1",
            "there is no flag --noconfig.data.shuffle; is --config.data.shuffle meant?",
        ),
        ("--noconfig.steps", "is --config.steps meant?"),
        ("--config.train_parts=all", "--config.train_parts=all: a list like [['text', 0.5]] is expected"),
        (
            "--config.model.decoder.rope_scaling=8",
            "--config.model.decoder.rope_scaling=8: None or build is expected",
        ),
        (
            "--config.model.decoder.rope_scaling.low=2",
            """model.decoder.rope_scaling.low can not be applied because field "rope_scaling" is None""",
        ),
        (
            "--config.model.image.adapter.kind=nope",
            "there is no adapter 'nope'; choose from linear, mlp, transformer, ",
        ),
        ("--config.model.image.encoders.1.patch=8", "is --config.model.image.encoders.0.patch meant?"),
        ("--config.model.encoder.image_size=96", "is --config.model.image.encoders.0.image_size meant?"),
        ("--config.parts_from=mine", "--config.parts_from=mine: text like {'name': 'text'} is expected"),
        ("--config.steps", "--config.steps has no value: it is written --config.steps=value"),
        ("5", "unexpected 5: flags are written --NAME=value"),
    ],
)
def test_what_is_wrong_in_a_line(words, message):
    assert message in said(ConfigFlags, "--config=tiny", words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--generation.max_new_tokens=abc", "--generation.max_new_tokens=abc: a whole number is expected"),
        ("--generation.num_beams=2.5", "--generation.num_beams=2.5: a whole number is expected"),
        ("--generation.num_beams=0", "num_beams is 0"),
        ("--generation.banned=abc", "--generation.banned=abc: a list like ['text'] is expected"),
        ("--generation.banned_tokens=[1, 2]", "a list like [[1]] is expected"),
        ("--generation.temperature=None", "a number is expected"),
        ("--generation.nonsense=1", "there is no flag --generation.nonsense"),
        ("--generation.max_tokens=1", "is --generation.max_new_tokens meant?"),
        ("--generation.offical", "is --generation.official meant?"),
    ],
)
def test_what_is_wrong_with_generation_in_a_line(words, message):
    assert message in said(GenerationFlags, words)


def test_what_is_wrong_with_a_mesh_in_a_line():
    assert "--mesh.data=two: a whole number is expected" in said(mesh, "--mesh.data=two")
    assert "there is no flag --mesh.nonsense" in said(mesh, "--mesh.nonsense=1")
    assert "mesh sizes (0, 1, 1): positive" in said(mesh, "--mesh.data=0")


def test_what_is_missing_in_a_line():
    here = flags.FlagValues()
    section = ConfigFlags(here)
    flags.DEFINE_string("workdir", None, "", here)
    flags.mark_flags_as_required(["config", "workdir"], here)
    with pytest.raises(SystemExit) as caught:
        command.parsed(["train"], list(here), [section], here)
    assert (
        str(caught.value)
        == "error: --config is missing; --help says what it is. --workdir is missing; --help says what it is"
    )


def test_ctrl_c_is_a_line_and_a_status(monkeypatch, capsys):
    statuses = []
    monkeypatch.setattr(command.app, "run", lambda main, argv, flags_parser: statuses.append(main(argv)))

    def interrupted(_):
        raise KeyboardInterrupt

    command.run(interrupted)
    assert statuses == [130] and capsys.readouterr().err == "\nstopped\n"


def test_commands_are_those_that_can_be_run():
    package = Path(__main__.__file__).parent
    there = [file.stem for file in package.glob("*.py") if '__name__ == "__main__"' in file.read_text()]
    named = [usage.split()[2].removeprefix("omnifusion_jax.") for usage in __main__.commands()]
    assert named == sorted(set(there) - {"__main__"})


# --- --help, and what a run says of its config


def test_help_lists_flags_and_fields():
    here = flags.FlagValues()
    sections = [GenerationFlags(here), ConfigFlags(here)]
    lines = [
        " ".join(line.split())
        for line in page("python -m this", [here[name] for name in here], sections).splitlines()
    ]
    assert lines[0] == "python -m this"
    expected = [
        "--generation.official Start from the recipe published with OmniFusion-1.1.",
        "num_beams int 1 above 1: beam search",
        "banned list [] strings that may not be produced, as the",  # goes on in the next line
        "init_from str | None None native directory, or what the original's phase 1",
        "model.image.adapter.eps float 1e-05 of norms",
        "with --config.model.image.adapter.kind=mlp",
        "model.image.adapter.activation str gelu or gelu_tanh",
        "model.image.adapter.queries int 64 rows that come out: those of a square grid",
        "model.image.encoders.0.patch int 14 pixels a side of a patch",
        "model.decoder.rope_scaling build | None None as Llama 3.1 has it",
        "parts_from dict {} {part: directory or hub id}, of the parts",
    ]
    assert [line for line in expected if line not in lines] == []
    assert not any(line.startswith("model.decoder.rope_scaling.") for line in lines)  # of what is not there


def test_help_of_a_flag_that_may_be_repeated_is_one_sentence():
    here = flags.FlagValues()
    flags.DEFINE_multi_string("image", [], "Picture to talk about", flag_values=here)
    said = page("", [here["image"]]).partition("--image")[2].strip()
    assert said == "Picture to talk about; repeat this option to specify a list of values"


def test_help_may_be_cut_off(monkeypatch):
    """As by `--help | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        command.show("x" * 100_000)


def test_differences_are_told_of_parts_that_one_side_lacks():
    c = preset("omnifusion-tiny")
    other = dataclasses.replace(c.decoder, rope_scaling=RopeScaling(factor=4.0))
    assert differences(c.decoder, other)["rope_scaling.factor"] == (None, 4.0)
    assert differences(other, c.decoder)["rope_scaling.factor"] == (4.0, None)
    assert differences(c, c) == {}


def test_changes():
    file = shipped.load("sft:original")
    assert changes(file, file).splitlines()[0] == "As the config file says."
    ours = config(
        "--config=sft:original",
        "--config.steps=3",
        "--config.model.image.adapter.dropout=0.3",
        "--config.optimizer.clip=1.5",
    )
    assert [" ".join(line.split()) for line in changes(ours, file).splitlines()] == [
        "As the config file says, except:",
        "steps 3 (not 1850)",
        "optimizer.clip 1.5 (not None)",
        "As the preset omnifusion-1.1 says, except:",
        "model.image.adapter.init torch (not normal)",
        "model.image.adapter.dropout 0.3 (not 0.1)",
        "model.layout original (not omnifusion)",
    ]
    other = config("--config=sft", "--config.model.preset=llava-1.5-7b")
    assert [" ".join(line.split()) for line in changes(other, shipped.load("sft")).splitlines()] == [
        "As the config file says, except:",
        "model.preset llava-1.5-7b (not omnifusion-1.1)",
        "As the preset llava-1.5-7b says.",
    ]
