"""A command that starts itself again with huge pages: when, and that it stays the same process."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from omnifusion_jax.cli import huge_pages
from omnifusion_jax.cli.huge_pages import ensure, wanted

ASKED, CPU = "glibc.malloc.hugetlb=1", {"JAX_PLATFORMS": "cpu"}
NEW, GPU = (2, 36), ["/dev/nvidia0"]


@pytest.mark.parametrize(
    ("environment", "glibc", "mode", "accelerators", "expected"),
    [
        (CPU, NEW, "madvise", [], ASKED),
        (CPU, (2, 35), "madvise", GPU, ASKED),  # a CPU is asked for
        ({}, NEW, "madvise", [], ASKED),
        ({"JAX_PLATFORMS": ""}, NEW, "madvise", [], ASKED),
        ({"JAX_PLATFORMS": "cpu,tpu"}, NEW, "madvise", [], ASKED),
        (CPU | {"GLIBC_TUNABLES": "glibc.rtld.nns=5"}, NEW, "madvise", [], f"glibc.rtld.nns=5:{ASKED}"),
        (CPU | {"GLIBC_TUNABLES": ASKED}, NEW, "madvise", [], None),  # it was done, or by the user
        (CPU | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, NEW, "madvise", [], None),
        ({}, NEW, "madvise", GPU, None),
        ({"JAX_PLATFORMS": "tpu,cpu"}, NEW, "madvise", [], None),
        ({"JAX_PLATFORMS": "cuda"}, NEW, "madvise", [], None),
        (CPU, NEW, "always", [], None),
        (CPU, NEW, "never", [], None),
        (CPU, (2, 34), "madvise", [], None),
        (CPU, (), "madvise", [], None),  # no glibc at all
    ],
)
def test_when_it_is_wanted(environment, glibc, mode, accelerators, expected):
    assert wanted(environment, glibc, mode, accelerators) == expected


@pytest.mark.parametrize(
    ("command", "again"),
    [
        (["python", "-m", "a.train", "--workdir=b"], True),
        (["python", "-X", "dev", "-m", "a.train", "--workdir=b"], True),
        (["python", "-c", "from multiprocessing.forkserver import main"], False),  # a fork of that process
        (["python", "own.py", "--workdir=b"], False),  # called by a program
        (["python", "-m", "a.plan", "--workdir=b"], False),
    ],
)
def test_only_the_command_itself_starts_again(monkeypatch, command, again):
    started = []
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
    monkeypatch.setattr(huge_pages, "wanted", lambda *given: ASKED)
    monkeypatch.setattr(sys, "argv", ["/a/train.py", "--workdir=b"])
    monkeypatch.setattr(sys, "orig_argv", command)
    ensure("a.train")
    assert started == [(sys.executable, command, os.environ | {"GLIBC_TUNABLES": ASKED})] * again


NEEDED = pytest.mark.skipif(
    wanted(CPU, huge_pages.glibc(), huge_pages.mode(), []) is None,
    reason="this machine has no huge pages to ask for",
)
NOTE = """
import os, sys
with open(os.environ["STARTS"], "a") as file:
    print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.orig_argv[1:], sep="|", file=file)
"""


def begin(folder, module, *arguments):
    """A process whose every start leaves a line in FOLDER/starts."""
    (folder / "sitecustomize.py").write_text(NOTE)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= CPU | {"PYTHONPATH": f"{folder}:{ROOT}", "STARTS": str(folder / "starts")}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def starts(folder, process, module, *arguments):
    """Whether it was started twice, the second time with huge pages, and was the same process."""
    word = "|".join(["-m", module, *arguments])
    lines = (folder / "starts").read_text().splitlines()
    return lines == [f"{process.pid}|{given}|{word}" for given in (None, ASKED)]


@NEEDED
def test_it_stays_the_same_process(tmp_path):
    """Its number, its words, what it reads, and how signals and its own status end it."""
    lines = "import sys, time", "from omnifusion_jax.cli.huge_pages import ensure", "ensure('probe')"
    body = "print('ready', flush=True)", "sys.exit(3) if input() == 'end' else time.sleep(60)"
    (tmp_path / "probe.py").write_text("\n".join(lines + body))
    process = begin(tmp_path, "probe", "two words", "")
    assert process.communicate("end\n", timeout=60)[0] == "ready\n" and process.returncode == 3
    assert starts(tmp_path, process, "probe", "two words", "")
    for number in (2, 15):
        process = begin(tmp_path, "probe")
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == -number


@NEEDED
def test_training_starts_with_them(tmp_path):
    process = begin(tmp_path, "omnifusion_jax.train", "--workdir=a b")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and said == "error: --config is missing; --help says what it is\n"
    assert starts(tmp_path, process, "omnifusion_jax.train", "--workdir=a b")
