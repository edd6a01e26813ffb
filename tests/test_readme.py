"""What the pages show is done.

Their Python is executed; commands are run where that is cheap, else their flags and configs are checked.
"""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from absl import flags
from conftest import FAST_COMPILATION
from PIL import Image, ImageDraw
from processes import run_module

from omnifusion_jax import shipped
from omnifusion_jax.batch import outline
from omnifusion_jax.checkpoints.storage.bundled import BUNDLED, locate
from omnifusion_jax.chips import CHIPS
from omnifusion_jax.cli import command
from omnifusion_jax.cli.overrides import ConfigFlags
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.planning import topology

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT) for pattern in ("*.md", "docs/*.md", "launch/*.md") for page in ROOT.glob(pattern)
)
DIALOGUES = ROOT.parent / "shared/data/real_dialogues/dialogues.json"
FENCE = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENVIRONMENT = {**os.environ, "XLA_FLAGS": FAST_COMPILATION, "PYTHONPATH": str(ROOT)}
SAID = "What colour is the circle?\n/quit\n"  # in the chat


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    name: str  # of the file that the block shows, where it does
    text: str


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [Block(page, text[: m.start()].count("\n") + 1, *m.groups()) for m in FENCE.finditer(text)]
    return [block for block in found if block.language == language]


def commands():
    """{words: page:line} of every command on every page."""
    seen = {}
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.text.replace("\\\n", " ").splitlines():
                for one in line.split("&&"):
                    words = tuple(shlex.split(one, comments=True))
                    if words and words not in seen:
                        seen[words] = f"{page}:{block.line}"
    return seen


COMMANDS = commands()


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the files that the pages show and the pictures they name."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "images").mkdir()
    picture = Image.new("RGB", (96, 96), (30, 35, 45))
    ImageDraw.Draw(picture).ellipse((34, 34, 62, 62), fill=(225, 45, 45))
    picture.save(folder / "picture.png")
    picture.save(folder / "images" / "receipt.jpg")
    shown = [block for page in PAGES for block in blocks(page, "json") if block.name]
    assert len({block.name for block in shown}) == len(shown)
    for block in shown:
        (folder / block.name).write_text(block.text, encoding="utf-8")
    return folder


def executed(page):
    """The names that a page's blocks leave behind, one after the other, in one namespace."""
    namespace = {}
    for block in blocks(page, "python"):
        exec(compile("\n" * block.line + block.text, ROOT / block.page, "exec"), namespace)
    return namespace


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=str)
def test_python(page, desk, monkeypatch):
    monkeypatch.chdir(desk)
    found = executed(page)
    if page.name == "README.md":
        assert found["answer"].text
    if page.name == "training.md":
        assert found["figures"]["steps"] == 2
    if page.name == "inference.md":
        assert found["scores"][0].shape[1] == found["model"].config.decoder.vocab


def test_readme_is_read_in_one_go():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170


def test_memory_is_that_of_the_presets():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- memory -->(.*?)<!-- /memory -->", text, re.DOTALL)
    computed = (ROOT / "docs/presets.md").read_text(encoding="utf-8")
    assert len(rows := table(block)) >= 4
    assert all(f"| {' | '.join(row)} |" in computed for row in rows)


def test_training_data(desk):
    prepare = tiny.prepare(Tokenizer(locate("omnifusion-tiny-decoder")), 512)
    source = open_source(str(desk / "dialogues.json"), desk / "images", side=6)
    samples = [prepare(source[i]) for i in range(len(source))]
    assert len(samples) == 2 and [outline(sample).tiles.get("image", 0) for sample in samples] == [1, 0]


# --- commands: first words -> check(arguments, desk)


def run(module, arguments, desk):
    status, said = run_module(f"omnifusion_jax.{module}", arguments, desk, ENVIRONMENT, SAID)
    assert status == 0, said[-4000:]
    return said


PARSE = """
import importlib, json, sys
from absl import flags
importlib.import_module(sys.argv[1])
refused = []
for words in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()
    try:
        left = flags.FLAGS(words)[1:]
        refused.append(f"unexpected {left}" if left else None)
    except flags.Error as error:
        refused.append(str(error))
print(json.dumps(refused))
"""


@functools.cache
def refused(module):
    """{arguments: what its flags refuse, or None} of a module's commands on the pages, from one process."""
    first = ("python", "-m", f"omnifusion_jax.{module}")
    found = [words[3:] for words in COMMANDS if words[:3] == first]
    command = [sys.executable, "-c", PARSE, first[2]]
    text = json.dumps([[module, *words] for words in found])
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, input=text, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(found, json.loads(done.stdout), strict=True))


def parse(module, arguments):
    """Only parses the flags, of a command that needs the network or a large model."""
    assert refused(module)[tuple(arguments)] is None


def value(arguments, flag, default=None):
    return next((a.partition("=")[2] for a in arguments if a.startswith(f"--{flag}=")), default)


def run_or_parse(module, flag, arguments, desk):
    model = value(arguments, flag, "omnifusion-tiny")
    if model in BUNDLED or (desk / model).is_dir():
        return run(module, arguments, desk)
    return parse(module, arguments)


def check_generate(arguments, desk):
    run_or_parse("generate", "model", arguments, desk)
    rows = [
        json.loads(line)
        for line in (desk / value(arguments, "output")).read_text(encoding="utf-8").splitlines()
    ]
    assert [row["error"] for row in rows] == [None, None]


def check_collect_feedback(arguments, desk):
    if run_or_parse("collect_feedback", "model", arguments, desk) is not None:
        assert (desk / value(arguments, "output") / "pairs.jsonl").is_file()


def check_convert(arguments, desk):
    said = run_or_parse("convert", "source" if value(arguments, "source") else "decoder", arguments, desk)
    if said is not None:
        output = value(arguments, "output")
        assert "adapter" in said and (output is None or any((desk / output).iterdir()))


def check_side_by_side(arguments, desk):
    """What the page shows is what it prints."""
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "examples/llava_side_by_side.py"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    page = (ROOT / "docs/conversion.md").read_text(encoding="utf-8")
    assert len(lines := done.stdout.splitlines()) == 14 and all(line.rstrip() in page for line in lines)


def check_chat(arguments, desk):
    said = run_or_parse("chat", "model", arguments, desk)
    if said is not None:
        picture, answer = said.splitlines()
        assert picture.startswith("[picture 1: ") and answer.strip()


def check_check_data(arguments, desk):
    assert "nothing wrong with 2 records" in run("check_data", arguments, desk)


def check_train(arguments, desk):
    """Builds the config and applies what is set on the command line; nothing is trained."""
    here = flags.FlagValues()
    config, workdir = ConfigFlags(here), flags.DEFINE_string("workdir", None, "", here)
    flags.DEFINE_integer("replay", None, "", flag_values=here)
    command.parsed(["train", *arguments], list(here), [config], here)
    assert workdir.value
    config.value.validate()


def check_plan(arguments, desk):
    """The same; what is planned is not compiled, which takes minutes."""
    here = flags.FlagValues()
    config = ConfigFlags(here)
    for name in ("topology", "device", "what"):
        flags.DEFINE_string(name, None, "", flag_values=here)
    flags.DEFINE_integer("rows", None, "", flag_values=here)
    flags.DEFINE_bool("search", False, "", flag_values=here)
    command.parsed(["plan", *arguments], list(here), [config], here)
    assert here.what in (None, "step", "prefill", "decode")
    assert (here.topology is None) != (here.device is None)
    assert (here.topology or "v4").split("-")[0] in topology.TPUS
    assert (here.device or "h100").split("x")[0] in CHIPS
    config.value.validate()


def check_pytest(arguments, desk):
    assert all((ROOT / a).exists() for a in arguments if a.startswith("tests"))


def check_make(arguments, desk):
    targets = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert {a for a in arguments if "=" not in a} <= set(targets)
    assert {a.partition("=")[0] for a in arguments if "=" in a} <= {"PYTHON", "VENV"}


def check_pip(arguments, desk):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[:2] == ["install", "-e"] and re.fullmatch(r"\.(\[(\w+)\])?", arguments[2])
    assert arguments[2] == "." or arguments[2][2:-1] in extras


def check_launch(*words):
    """Has a launcher say what it would do, and looks at the flags of training in it."""

    def check(arguments, desk):
        said = subprocess.run(
            [*words, "--dry-run", *arguments], capture_output=True, text=True, check=True
        ).stdout
        assert said
        training = arguments[arguments.index("--") + 1 :] if "--" in arguments else arguments
        training = [word for word in training if word.startswith("--")]
        if any(word.startswith("--workdir") for word in training):
            hosts = ("--hosts=", "--host=", "--of=")
            check_train([word for word in training if not word.startswith(hosts)], desk)

    return check


def nothing(arguments, desk):
    """Clones, changes of folder, an environment that is made active, hours of training."""


CHECKS = {
    "python -m omnifusion_jax.generate": check_generate,
    "python -m omnifusion_jax.collect_feedback": check_collect_feedback,
    "python -m omnifusion_jax.convert": check_convert,
    "python -m omnifusion_jax.chat": check_chat,
    "python -m omnifusion_jax.compare": lambda arguments, desk: parse("compare", arguments),
    "python -m omnifusion_jax.check_data": check_check_data,
    "python -m omnifusion_jax.train": check_train,
    "python -m omnifusion_jax.plan": check_plan,
    "launch/local.py": check_launch(sys.executable, "launch/local.py"),
    "launch/gpu.sh": check_launch("launch/gpu.sh"),
    "sbatch launch/slurm.sbatch": check_launch("bash", "launch/slurm.sbatch"),
    "launch/tpu_vm.sh": check_launch("launch/tpu_vm.sh"),
    "launch/gke/submit.py": check_launch(sys.executable, "launch/gke/submit.py"),
    "python examples/make_tiny.py": nothing,
    "python examples/align.py": nothing,
    "python examples/llava_side_by_side.py": check_side_by_side,
    "pytest": check_pytest,
    "make": check_make,
    "pip": check_pip,
    "git clone": nothing,
    "cd": nothing,
    ".": nothing,
}


def check_command(words, desk):
    known = [first for first in CHECKS if words[: len(first.split())] == first.split()]
    assert len(known) == 1, f"no check for {' '.join(words)}: add one to CHECKS"
    CHECKS[known[0]](words[len(known[0].split()) :], desk)


LONG = "python examples/llava_side_by_side.py"


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            list(words),
            id=f"{where}:{' '.join(words)[:70]}",
            marks=pytest.mark.sweep if " ".join(words).startswith(LONG) else (),
        )
        for words, where in COMMANDS.items()
    ],
)
def test_command(words, desk, monkeypatch):
    if "--to=omnifusion" in words:
        pytest.importorskip("torch")
    monkeypatch.chdir(ROOT)
    check_command(words, desk)


# --- what pages point to


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


# --- figures


def table(text):
    """The cells of a table's rows, without its head."""
    return [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ][2:]


def figures():
    """{what: (figure, command)} of README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^<!-- figures -->$(.*?)^<!-- /figures -->$", text, re.DOTALL | re.MULTILINE)
    return {what: (figure, command.strip("`")) for what, figure, command in table(block)}


def figure(what, pattern):
    return re.fullmatch(pattern, figures()[what][0]).groups()


def test_figures_of_the_demo_are_those_of_its_page_and_its_configs():
    """Which page says with what steps they came out; tests/test_bundled.py asks the bundled model."""
    percent, count = figure("questions about held-out pictures, answered exactly", r"([\d.]+) % of (\d+)")
    (blind,) = figure("the same questions about black pictures", r"([\d.]+) %")
    assert 92 <= float(percent) <= 100 and 10 < float(blind) < 30
    (row,) = [
        row
        for row in table((ROOT / "docs/tiny.md").read_text(encoding="utf-8"))
        if row[0] == "both phases (`make demo`)"
    ]
    pretrain, sft = shipped.load("tiny:pretrain"), shipped.load("tiny:sft")
    assert int(count) == sft.eval.count
    assert row == [
        "both phases (`make demo`)",
        f"{pretrain.steps} and {sft.steps}, {sft.batch_size}",
        f"{float(percent) / 100:.3f}",
        f"{count} questions; {float(blind) / 100:.3f} about black pictures",
    ]


def test_figures_that_are_counted_and_timed():
    right, asked = figure("real dialogues given back word for word", r"(\d+) of (\d+) answers")
    assert right == asked
    if DIALOGUES.is_file():
        records = json.loads(DIALOGUES.read_text(encoding="utf-8"))
        assert int(asked) == sum(
            turn["from"] == "gpt" for record in records for turn in record["conversations"]
        )
    minutes, seconds = figure("both phases with evaluation, two CPU cores", r"(\d+) min (\d+) s")
    assert 1 <= int(minutes) < 15 and int(seconds) < 60


@pytest.mark.parametrize("what", figures())
def test_a_figure_has_its_command(what, desk, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(shlex.split(figures()[what][1]), desk)


def test_the_fast_tests_are_there():
    said = subprocess.run(
        ["make", "-n", "test-fast"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    names = re.findall(r" (tests/\S+)", said)
    assert len(names) > 10 and not [name for name in names if not (ROOT / name).exists()]
