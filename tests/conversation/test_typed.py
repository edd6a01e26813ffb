"""File names as terminals write them when a file is dragged in."""

import shlex

import pytest

from omnifusion_jax.conversation.typed import dragged, named, plain

NAMES = ("cat.png", "my cat.JPG", "it's.webp", 'a "b" (1) & $HOME.png', "кот.png", "back\\slash.png")


@pytest.fixture(params=NAMES)
def file(request, tmp_path):
    file = tmp_path / "some pictures" / request.param
    file.parent.mkdir()
    file.touch()
    return file


def backslashed(name):
    return "".join(c if c.isalnum() or c in "/._-" else f"\\{c}" for c in name)


WAYS = {"quoted": shlex.quote, "backslashed": backslashed}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("line", ["{}", "{} What's it?", "What's it? {}", "What's in {}, and why?"])
def test_a_dragged_picture_is_found(file, how, line):
    found, rest = dragged(line.format(WAYS[how](str(file))))
    assert found == [str(file)] and rest == " ".join(line.format("").split())


@pytest.mark.parametrize("how", WAYS)
def test_names_after_a_command(file, how):
    name = WAYS[how](str(file))
    assert named(f" {name} ") == [str(file)] == [plain(name)]
    assert named(str(file)) == [str(file)]  # as it stands
    assert named(f"{name} b.png {name}") == [str(file), "b.png", str(file)]


def test_urls_homes_and_double_quotes(tmp_path, monkeypatch):
    (file := tmp_path / "my кот.png").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (file.as_uri(), r"~/my\ кот.png", '"~/my кот.png"', f'"{file}"'):
        assert dragged(f"who is {name} here") == ([str(file)], "who is here")
        assert named(name) == [str(file)]
    monkeypatch.chdir(tmp_path)
    assert dragged("./my\\ кот.png ../nowhere.png") == (["./my кот.png"], "../nowhere.png")


def test_words_that_are_no_pictures_stay_words(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.png").mkdir()
    for line in (
        f"read {tmp_path}/notes.txt",
        f"{tmp_path}/folder.png",
        "and/or  'x'",
        "1 / 2",
        "what's / is",
    ):
        assert dragged(line) == ([], line)


def test_several_in_a_line(tmp_path):
    (one := tmp_path / "a.png").touch()
    (two := tmp_path / "b c.gif").touch()
    assert dragged(f"compare {one} with '{two}'.") == ([str(one), str(two)], "compare with .")
    assert dragged(f"{one} '{two}'") == ([str(one), str(two)], "")
