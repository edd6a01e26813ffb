"""Runs `python -m MODULE` in a process of its own that need not import other people's libraries again.

They take most of the seconds of a start. A server imports them once and starts no device; every process is a
fork of it, and imports what is ours for itself.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = (
    "absl.app jax.numpy flax.nnx optax orbax.checkpoint ml_collections PIL.Image rich.progress sentencepiece "
    "tensorboardX tokenizers"
)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(LIBRARIES.split())


def run_module(module, arguments, folder, environment, given=""):
    """(exit status, what was printed, stderr included) of `python -m MODULE ARGUMENTS` in a folder.

    What is read when Python or JAX starts (GLIBC_TUNABLES, JAX_*) is as it was at the first call.
    """
    with tempfile.TemporaryDirectory() as beside:
        words, said = Path(beside, "given"), Path(beside, "said")
        words.write_text(given, encoding="utf-8")
        child = begin_module(module, arguments, folder, environment, words, said)
        child.join(900)
        if child.is_alive():
            child.kill()
            raise TimeoutError(f"{module} does not end: {said.read_text(encoding='utf-8')[-4000:]}")
        return child.exitcode, said.read_text(encoding="utf-8")


def begin_module(module, arguments, folder, environment, given, said):
    """The running process of `python -m MODULE ARGUMENTS`, which reads `given` and prints to `said`."""
    child = SERVER.Process(target=become, args=(module, arguments, folder, environment, given, said))
    child.start()
    return child


def become(module, arguments, folder, environment, given, said):
    """Makes this process what `python -m MODULE ARGUMENTS` would be, and runs it."""
    os.dup2(os.open(given, os.O_RDONLY), 0)
    printed = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    others = [path for path in sys.path if not Path(path).is_relative_to(HERE)]
    sys.path[:] = [str(folder), environment["PYTHONPATH"], *others]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a forked process ends without
