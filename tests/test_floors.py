"""Who may import whom: a room knows itself and the floors below it, as docs/architecture.md draws them."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "omnifusion_jax"
FLOORS = (
    ("errors", "batch", "published_templates", "nested"),
    ("tables",),
    ("config",),
    ("sharding", "fields", "hosts", "paths", "chips", "kept_programs"),
    ("nn",),
    ("models", "data"),
    ("training", "inference", "checkpoints", "data_report"),
    ("evaluation", "planning", "jobs", "conversation", "feedback"),
    ("objectives",),
    (
        "api",
        "omnilmm",
        "run",
        "shipped",
        "changes",
        "cli",
        "train",
        "convert",
        "generate",
        "prepare_data",
        "chat",
        "compare",
        "check_data",
        "plan",
        "collect_feedback",
        "__init__",
        "__main__",
    ),
)
CHECKPOINTS = (  # the same within checkpoints/
    ("storage",),
    ("integers", "joined"),
    ("mapping",),
    ("encoders", "decoders", "checkpoint", "tokenizers"),
    ("omnifusion", "llava", "omnilmm", "native", "base"),
    ("load",),
    ("assemble", "inspect"),
    ("convert", "__init__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITHIN = {room: floor for floor, rooms in enumerate(CHECKPOINTS) for room in rooms}
TOP = len(FLOORS) - 1


def room_of(file, folder=PACKAGE):
    first = file.relative_to(folder).parts[0]
    return first.removesuffix(".py")


def imported(file, package="omnifusion_jax"):
    """Rooms of `package` that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == package
                else [node.module]
            )
        for name in names:
            if name.startswith(f"{package}."):
                yield name.removeprefix(f"{package}.").split(".")[0]


FILES = sorted(file for file in PACKAGE.rglob("*.py") if "assets" not in file.parts)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_imports_upwards(file):
    room = room_of(file)
    for other in set(imported(file)) - {room}:
        below = FLOOR[other] < FLOOR[room] or (FLOOR[room] == TOP == FLOOR[other])
        assert below, f"{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})"


ROOMS = PACKAGE / "checkpoints"


@pytest.mark.parametrize("file", sorted(ROOMS.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOMS)))
def test_no_file_of_checkpoints_imports_upwards(file):
    room = room_of(file, ROOMS)
    for other in set(imported(file, "omnifusion_jax.checkpoints")) - {room}:
        assert WITHIN[other] < WITHIN[room], (
            f"{room} (floor {WITHIN[room]}) imports {other} (floor {WITHIN[other]})"
        )


def test_every_room_has_a_floor():
    assert {room_of(file) for file in FILES} == set(FLOOR)
    assert {room_of(file, ROOMS) for file in ROOMS.rglob("*.py")} == set(WITHIN)


def test_flax_nnx_is_touched_in_one_place():
    named = [
        file.relative_to(PACKAGE)
        for file in FILES
        if "flax" in {line.split()[1].split(".")[0] for line in lines(file)}
    ]
    assert named == [Path("nn/nnx.py")]


def test_what_is_jax_s_own_is_touched_in_one_place():
    named = [file.relative_to(PACKAGE) for file in FILES if "jax._src" in file.read_text(encoding="utf-8")]
    assert named == [Path("hosts/store.py")]


def lines(file):
    text = file.read_text(encoding="utf-8").splitlines()
    return [line for line in text if line.startswith(("import ", "from "))]
