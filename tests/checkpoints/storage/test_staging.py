"""Directories that have their name only when they are complete."""

import errno
import os

import pytest

from omnifusion_jax.checkpoints.storage.staging import written_beside
from omnifusion_jax.errors import CheckpointError


def listed(directory):
    return sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*"))


def test_an_empty_directory_may_be_there(tmp_path):
    (tmp_path / "model").mkdir()
    with written_beside(tmp_path / "model") as partial:
        (partial / "file").touch()
        assert listed(tmp_path) == ["model", "model.unfinished", "model.unfinished/file"]
    assert listed(tmp_path) == ["model", "model/file"]


def test_a_place_within_a_file_is_none(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(CheckpointError, match=r"file/new cannot be made: Not a directory")
    with refused, written_beside(tmp_path / "file" / "new"):
        pass


def test_what_came_in_the_meantime_stays(tmp_path):
    with (
        pytest.raises(CheckpointError, match="model exists already and is not overwritten"),
        written_beside(tmp_path / "model"),
    ):
        (tmp_path / "model").mkdir()
        (tmp_path / "model/other").touch()
    assert listed(tmp_path) == ["model", "model/other"]


FULL = "the disk became full while it was written, and nothing was kept. 7 bytes"


@pytest.mark.parametrize(
    "number, said", [(errno.ENOSPC, FULL), (errno.EDQUOT, FULL), (errno.EIO, "Input/output error")]
)
def test_only_a_full_disk_is_called_one(tmp_path, number, said):
    kind = CheckpointError if said == FULL else OSError
    with pytest.raises(kind, match=said), written_beside(tmp_path / "model", 7):
        raise OSError(number, os.strerror(number))
    assert listed(tmp_path) == []


def test_too_little_room_is_seen_before(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"1,152,921,504,606,846,976 bytes are needed, [\d,]+ are free"),
        written_beside(tmp_path / "model", 1 << 60),
    ):
        pass
    assert listed(tmp_path) == []
