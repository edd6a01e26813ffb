"""Files that grow, of a run whose workdir is in a store, where nothing can be appended to."""

import tempfile
import time
from pathlib import Path

from omnifusion_jax.paths import remote

EVERY = 30.0  # seconds between two copies of what has grown


class Mirror:
    """A folder on this machine that stands for `workdir`: itself, or a temporary one that is copied there.

    Args:
      names: files and folders of the workdir that are fetched first.
    """

    def __init__(self, workdir, *names: str):
        self.workdir, self.here, self.copied_at, self.kept = workdir, workdir, time.monotonic(), None
        if remote(workdir):
            self.kept = tempfile.TemporaryDirectory(prefix="omnifusion_jax-")
            self.here = Path(self.kept.name)
            for name in names:
                if (workdir / name).exists():
                    (self.here / name).write_bytes((workdir / name).read_bytes())

    def grown(self):
        """Copies all files, unless that was done a short while ago."""
        if time.monotonic() - self.copied_at > EVERY:
            self.copy()

    def copy(self):
        """Copies all files to the workdir."""
        if self.kept is None:
            return
        for file in self.here.rglob("*"):
            if file.is_file():
                there = self.workdir / file.relative_to(self.here).as_posix()
                there.parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(file.read_bytes())
        self.copied_at = time.monotonic()

    def close(self):
        self.copy()
        if self.kept is not None:
            self.kept.cleanup()
