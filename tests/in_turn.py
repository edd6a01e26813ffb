"""Runs command lines of one command in turn in one process, since a start takes seconds."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__)


def in_turn(name, lines, folder, failed=1):
    """Runs `python -m omnifusion_jax.NAME` with each of `lines`, {name: arguments}, from a folder.

    Returns {name: (exit status, stdout, stderr)}.
    """
    done = subprocess.run(
        [sys.executable, HERE, name, str(failed)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
        input=json.dumps(lines),
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def main(name, failed):
    for other in ("grain", "tensorflow_datasets"):  # they define flags, which flagsaver would forget
        with contextlib.suppress(ImportError):
            importlib.import_module(other)
    from absl.testing import flagsaver

    from omnifusion_jax.cli import command

    module, found = importlib.import_module(f"omnifusion_jax.{name}"), {}
    sections = [module.CONFIG] if hasattr(module, "CONFIG") else []
    for key, words in json.load(sys.stdin).items():
        out, err = io.StringIO(), io.StringIO()
        with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                command.run(module.main, *sections, argv=[name, *words], failed=failed)
            except SystemExit as ended:
                found[key] = ended.code or 0, out.getvalue(), err.getvalue()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
