"""Work that runs ahead keeps its order, raises what went wrong, and leaves nothing behind however it ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from omnifusion_jax.data.ahead import Ahead
from omnifusion_jax.errors import OmniFusionError

ROOT = Path(__file__).parents[2]


def ahead(function, processes, start=0, size=6):
    return Ahead(function, range(10**6), start, processes=processes, ahead=size)


def take(results, count):
    return [next(results) for _ in range(count)]


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_results_come_in_order_from_wherever_one_starts(processes):
    results = ahead(lambda i: (i, i * i), processes, start=7)
    assert take(results, 50) == [(i, i * i) for i in range(7, 57)]
    results.close()
    results.close()


def test_no_more_is_made_than_was_asked_for():
    made = []
    results = ahead(made.append, 0, size=6)
    time.sleep(0.5)
    assert 6 <= len(made) <= 8  # each thread holds one more
    take(results, 10)
    time.sleep(0.5)
    assert 16 <= len(made) <= 18
    results.close()


def test_a_worker_process_imports_what_it_needs_alone():
    """No JAX, not the main module; a session of its own; what it prints is not taken for an answer."""

    def seen(_):
        print("hello")
        return (
            sorted({"jax", "flax", "pytest", "_pytest", "grain"} & set(sys.modules)),
            os.getsid(0),
            os.getpid(),
        )

    results = ahead(seen, 2)
    (modules, session, process), (_, _, other) = take(results, 2)
    assert modules == [] and session == process != other != os.getpid()
    results.close()


def pictures_and_text(_):
    import omnifusion_jax.data.check
    import omnifusion_jax.data.layout
    import omnifusion_jax.data.pictures
    import omnifusion_jax.data.pipeline
    import omnifusion_jax.data.sources
    import omnifusion_jax.data.tokenizer  # noqa: F401

    return "jax" in sys.modules


def test_reading_data_needs_no_jax():
    results = ahead(pictures_and_text, 1)
    assert next(results) is False
    results.close()


def test_what_a_function_raises_is_raised_in_its_turn():
    def picky(i):
        if i == 3:
            raise KeyError("three")
        return i

    alone, elsewhere = ahead(picky, 0), ahead(picky, 2)
    assert take(alone, 3) == take(elsewhere, 3) == [0, 1, 2]
    for _ in range(2):  # and again, rather than waiting for ever
        with pytest.raises(KeyError, match="three"):
            next(alone)
        with pytest.raises(RuntimeError, match=r"in a worker process:\nTraceback(.|\n)*KeyError: 'three'"):
            next(elsewhere)


def test_a_worker_that_is_killed_is_named():
    def last(i):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    results = ahead(last, 1)
    with pytest.raises(
        OmniFusionError,
        match=r"ended with status -9, often because memory ran out; fewer data\.num_workers take less",
    ):
        take(results, 10)


def alive(processes):
    """Those of `processes` that still run; a dead one whose parent has not heard of it counts as gone."""
    states = {
        p: Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split()[0]
        for p in processes
        if Path(f"/proc/{p}").exists()
    }
    return [p for p, state in states.items() if state != "Z"]


def gone(processes, seconds=10):
    until = time.monotonic() + seconds
    while alive(processes) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(processes)


@pytest.mark.parametrize("processes", [0, 2])
def test_what_nobody_refers_to_ends(processes):
    results = ahead(lambda _: os.getpid(), processes)
    workers = {*take(results, 4)} - {os.getpid()}
    assert len(workers) == processes == len(alive(workers))
    threads = [thread for thread in results.close.peek()[2][3]]
    del results
    assert gone(workers) and not any(thread.is_alive() for thread in threads)


# So that it hears Ctrl-C, which background jobs of a shell do not
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
SCRIPT = """
    import os, signal, sys, time
    from omnifusion_jax.data.pipeline import Batches, keep
    from omnifusion_jax.batch import Tile, Sample
    import numpy as np

    class Squares:  # of the main module, which a worker does not import
        def __len__(self):
            return 1000
        def __getitem__(self, i):
            empty = np.zeros(1, np.int32)
            time.sleep(0.002)
            media = {"image": (np.zeros((1, 336, 336, 3), np.uint8),)}
            return Sample(np.array([os.getpid()]), empty, empty, np.zeros(1, np.float32), media, 1, 0)

    tiles = {"image": Tile(0, ((336, 336, 3),), np.uint8, 1)}
    batches = Batches(Squares(), keep, batch_size=8, length=1, tiles=tiles, num_workers=2)
    workers = {int(p) for _ in range(2) for p in next(batches).tokens[:, 0]}
    print(*workers, flush=True)
    def last():
        print(time.time(), flush=True)
"""
ENDINGS = {  # how a run ends -> (its last lines, exit status, the last line of stderr)
    "at its end": ("last()", 0, ""),
    "by an error": ("last(); {}[5]", 1, "KeyError: 5"),
    "by Ctrl-C": ("last(); os.killpg(0, signal.SIGINT); time.sleep(9)", -signal.SIGINT, "KeyboardInterrupt"),
    "by a scheduler": ("last(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", -signal.SIGTERM, ""),
    "killed": ("last(); os.kill(os.getpid(), signal.SIGKILL); time.sleep(9)", -signal.SIGKILL, ""),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_two_batches_from_two_workers_and_out(ending):
    """It ends within 2 s, with nothing on stderr but what is meant, and no process stays.

    The script does without `if __name__ == "__main__":`.
    """
    code, status, error = ENDINGS[ending]
    started = subprocess.Popen(
        [sys.executable, "-W", "default", "-c", HEARS + textwrap.dedent(SCRIPT) + code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = started.communicate(timeout=120)
    ended = time.time()
    *_, workers, last = out.splitlines()
    workers = [int(p) for p in workers.split()]
    assert len(workers) == 2 and started.returncode == status
    assert err.strip().splitlines()[-1:] == ([error] if error else []), err
    assert "semaphore" not in err and "shared_memory" not in err and err.count("Traceback") == bool(error)
    assert ended - float(last) < 2 + os.getloadavg()[0] / os.cpu_count()  # 2 s on an idle machine
    assert gone(workers)
