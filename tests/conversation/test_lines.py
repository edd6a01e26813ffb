"""Lines from a real terminal, and from pipes."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omnifusion_jax.conversation import lines

pytest.importorskip("readline")
ROOT = Path(__file__).parents[2]
TYPED = """
import signal, sys  # a child inherits whatever the tests before did with SIGINT
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from omnifusion_jax.conversation import lines
lines.remember(Path(sys.argv[1]))
for line in lines.typed():
    print(f"<{line}>", flush=True)
"""
PIPED = """
from omnifusion_jax.conversation import lines
for line in lines.piped():
    print(f"<{line}>")
"""


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *words):
        self.mine, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TYPED, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""

    def read(self):
        """Waits for more; returns whether there will be any."""
        assert select.select([self.mine], [], [], 300)[0], self.seen
        try:
            self.seen += os.read(self.mine, 4096).decode()
        except OSError:  # the program has ended
            return False
        return True

    def type(self, keys, until="", prompt=lines.PROMPT):
        """Types, and waits until something is printed after what was there, and a prompt after that."""
        begin = len(self.seen)
        os.write(self.mine, keys.encode())
        while not re.search(f"{re.escape(until)}.*{prompt}", self.seen[begin:], re.DOTALL):
            assert self.read(), self.seen

    def interrupt(self):
        """Presses Ctrl-C, again if need be: readline sees a signal only while it waits for a key."""
        begin = len(self.seen)
        for _ in range(6):
            time.sleep(0.5)  # until it waits
            self.process.send_signal(signal.SIGINT)
            while select.select([self.mine], [], [], 10)[0]:
                self.read()
                if lines.PROMPT in self.seen[begin:]:
                    return
        raise AssertionError(self.seen)

    def end(self):
        os.write(self.mine, b"\x04")
        while self.read():
            pass
        os.close(self.mine)
        return self.process.wait(60)


def test_a_terminal_edits_remembers_and_survives_ctrl_c(tmp_path):
    history = tmp_path / "state" / "history"
    one = Terminal(str(history))
    one.type("")
    one.type("what is ut\x1b[D\x7fi\n", "<what is it>")  # left, backspace: the u becomes an i
    one.type("dropped", "dropped", prompt="")
    one.interrupt()
    one.type("\x1b[A!\n", "<what is it!>")  # up: the last line again
    assert one.end() == 0 and "<dropped" not in one.seen
    assert history.read_text().splitlines() == ["what is it", "what is it!"]
    assert history.stat().st_mode & 0o777 == 0o600
    two = Terminal(str(history))
    two.type("")
    two.type("\x1b[A\x1b[A\n", "<what is it>")  # from the conversation before
    assert two.end() == 0


def test_a_history_that_cannot_be_kept_is_said_and_no_more(tmp_path):
    (tmp_path / "file").touch()
    one = Terminal(str(tmp_path / "file" / "history"))
    one.type("", "--history names another file")
    one.type("hello\n", "<hello>")
    assert one.end() == 0


@pytest.mark.parametrize("given", [b"one\n\n two ", b"one\r\n"])
def test_a_pipe_has_no_prompt(given):
    done = subprocess.run([sys.executable, "-c", PIPED], input=given, capture_output=True, cwd=ROOT)
    expected = given.decode().replace("\r", "").removesuffix("\n").split("\n")
    assert done.stdout.decode().splitlines() == [f"<{line}>" for line in expected] and not done.stderr


def test_what_is_no_utf_8_is_said():
    done = subprocess.run([sys.executable, "-c", PIPED], input=b"\xff\xfe\n", capture_output=True, cwd=ROOT)
    assert b"DataError: what is read is not UTF-8" in done.stderr
