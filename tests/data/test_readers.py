"""Samples are made ahead where they go into batches, errors come in their turn, and nothing stays behind."""

import os
import pickle
import platform
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from omnifusion_jax.batch import Sample, collate
from omnifusion_jax.data import readers
from omnifusion_jax.data.ahead import Ahead
from omnifusion_jax.data.readers import BadSample, Memory, Readers
from omnifusion_jax.errors import OmniFusionError

ROOT = Path(__file__).parents[2]
TILES = tiny.tiles(4, 5, rows=2)


def sample(i, pictures=1):
    """A sample of i % 5 + 1 tokens, and pictures in two views, that all tell its number."""
    n = i % 5 + 1
    tokens = np.full(n, i, np.int32)
    views = tuple(np.full((pictures, size, size, 3), i % 256, np.uint8) for size in (4, 5))
    return Sample(tokens, tokens % 2 * 4, tokens * 0, np.ones(n, np.float32), {"image": views}, pictures, 0)


def made_by(function, processes=0, tiles=TILES):
    return Readers(function, tiles, "number {}".format, processes)


def looks(made, count):
    """What is found under the first numbers."""
    for i in range(count):
        made.ask([(i, i)])
    return [made.look(i) for i in range(count)]


def arrays(batch):
    return [*batch[:-2], *batch.media["image"], *batch.extra.values()]


@pytest.mark.parametrize("processes", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_batch_is_what_its_samples_are_collated_to(processes, rows):
    """Whoever makes the samples, in whatever order; also several a row, and several rows a record."""
    one = lambda i: sample(i, i % 3)
    read = lambda i: [one(i), one(i + 50)][:rows]
    made = made_by(read, processes)
    plan = [[4, 1], [0], [7, 2, 3], [6]]
    for n in (3, 1, 0, 7, 4, 2, 6, 5):
        made.ask([(n, n)])
    batch = made.collect(plan, 20, pools=2)
    expected = collate(
        [[read(n)[row] for n in records] for records in plan for row in range(rows)], 20, TILES, 2
    )
    assert all(
        (a == b).all() and a.dtype == b.dtype for a, b in zip(arrays(batch), arrays(expected), strict=True)
    )
    assert all(a.flags.writeable and a.ctypes.data % 64 == 0 for a in arrays(batch))
    made.drop(5)
    assert made.maker_of == made.asked == made.outlines == {}
    made.ask([(0, 0)])  # a number may be used again
    assert made.collect([[0]], 20).tokens[0, 0] == 0
    made.close()


@pytest.mark.parametrize("processes", [0, 1])
def test_memory_serves_another_batch_when_nobody_has_its_arrays(processes):
    full, fresh = lambda i: [sample(24 + 5 * i, 2)], lambda i: [sample(26, 3 * i)]
    made = made_by(lambda i: full(i) if i < 4 else fresh(i - 4), processes)
    for i in range(8):
        made.ask([(i, i)])
    one = made.collect([[0], [1]], 5, pools=1)
    address, tiles = one.tokens.ctypes.data, one.media["image"][1]
    expected = tiles.copy()
    del one  # but not one of its arrays
    two = made.collect([[2], [3]], 5, pools=1)
    assert two.tokens.ctypes.data != address and (tiles == expected).all()
    del tiles
    three = made.collect([[5], [4]], 5, pools=1)
    assert three.tokens.ctypes.data == address
    again = collate([fresh(1), fresh(0)], 5, TILES, 1)
    assert all((a == b).all() for a, b in zip(arrays(three), arrays(again), strict=True))
    del two, three
    four = made.collect([[6], [7]], 50, pools=1, usual=20)  # larger than what is free
    assert (four.tokens[:, 5:] == 0).all() and four.tokens[1, 0] == 26
    made.close()


def test_numbers_and_indices_are_two_things():
    made = made_by(lambda i: [sample(i)])
    for n, index in enumerate([7, 7, 3]):
        made.ask([(n, index)])
    assert made.collect([[2], [0], [1]], 9).tokens[:, 0].tolist() == [3, 7, 7]


def test_a_bad_sample_is_told_and_dropped():
    made = made_by(lambda i: BadSample("broken", "damaged") if i == 1 else [sample(i)], 1)
    found = looks(made, 3)
    assert found[1] == BadSample("broken", "damaged") and found[2][0].length == 3
    made.drop(1)
    assert made.collect([[0], [2]], 5).tokens[:, 0].tolist() == [0, 2]
    made.close()


def test_a_worker_process_imports_what_it_needs_alone():
    """No JAX, not the main module; a session of its own; what it prints is not taken for an answer."""

    def seen(_):
        print("hello")
        found = {"jax", "flax", "pytest", "_pytest", "grain"} & set(sys.modules)
        return BadSample(sorted(found), (os.getsid(0), os.getpid()))

    made = made_by(seen, 2)
    found = looks(made, 8)
    assert all(one.problem == [] and one.reason[0] == one.reason[1] for one in found)
    assert len({one.reason[1] for one in found} - {os.getpid()}) == 2
    made.close()


def test_reading_data_needs_no_jax():
    def pictures_and_text(_):
        import omnifusion_jax.data.check
        import omnifusion_jax.data.layout
        import omnifusion_jax.data.pictures
        import omnifusion_jax.data.pipeline
        import omnifusion_jax.data.sources
        import omnifusion_jax.data.tokenizer  # noqa: F401

        return BadSample("jax" in sys.modules, "")

    made = made_by(pictures_and_text, 1)
    assert looks(made, 1)[0].problem is False
    made.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc, which is not here")
def test_a_worker_uses_its_memory_again():
    def fresh_pages(_):
        arrays = [np.ones(1 << 20, np.uint8) for _ in range(16)]
        del arrays
        return BadSample(resource.getrusage(resource.RUSAGE_SELF).ru_minflt, "")

    made = made_by(fresh_pages, 1)
    counts = [found.problem for found in looks(made, 6)]
    assert counts[-1] - counts[2] < 256  # of 16 MB each time, 4096 pages
    made.close()


def test_what_a_function_raises_is_raised_where_it_is_looked_at():
    def picky(i):
        if i == 3:
            raise KeyError("three")
        return [sample(i)]

    for processes, error, words in [
        (0, KeyError, "three"),
        (2, RuntimeError, r"in a worker process:\nTraceback(.|\n)*KeyError: 'three'"),
    ]:
        made = made_by(picky, processes)
        for i in range(5):
            made.ask([(i, i)])
        assert made.look(4)[0].length == 5
        for _ in range(2):  # and again, rather than waiting for ever
            with pytest.raises(error, match=words):
                made.look(3)
        made.close()


def test_a_worker_that_is_killed_is_named_with_the_record_it_was_reading():
    def last(i):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return [sample(i)]

    made = made_by(last, 1)
    for i in range(9):
        made.ask([(i, i + 1)])
    told = (
        r"ended with status -9, often because memory ran out; fewer data\.num_workers take less\. "
        "It was reading number 5$"
    )
    for n in (4, 8, 4):
        with pytest.raises(OmniFusionError, match=told):
            made.look(n)
    with pytest.raises(OmniFusionError, match=told):  # nor does it wait for what can come no more
        made.collect([[0]], 9)
    made.ask([(9, 9)])
    with pytest.raises(OmniFusionError, match=told):
        made.look(9)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_a_scheduler_sends_to_every_process_does_not_end_a_worker(number):
    made = made_by(lambda i: [sample(i)], 1)
    (outline,) = looks(made, 1)[0]  # it is there, and reads
    (maker,) = made.makers
    os.kill(maker.worker.process.pid, number)
    made.ask([(1, 1)])
    assert outline.length == 1 and made.look(1)[0].length == 2
    made.close()


@pytest.mark.parametrize("named", [False, True])
def test_memory_is_shared_and_leaves_nothing_behind(tmp_path, monkeypatch, named):
    if named:  # as on systems other than Linux
        monkeypatch.delattr(os, "memfd_create")
        monkeypatch.setattr(readers.tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd"))
    memory = Memory(1000)
    other = pickle.loads(pickle.dumps(memory))
    other.map[7] = 9
    memory.close()
    assert memory.map[7] == 9 and memory.map[8] == 0 and len(other.map) == 1000
    assert list(tmp_path.iterdir()) == []
    del memory, other
    readers.opened.cache_clear()
    assert set(os.listdir("/proc/self/fd")) == before


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
    made = made_by(lambda i: BadSample("", os.getpid()), processes)
    workers = {one.reason for one in looks(made, 8)} - {os.getpid()}
    assert len(workers) == processes == len(alive(workers))
    threads = [maker.thread for maker in made.makers]
    del made
    assert gone(workers) and not any(thread.is_alive() for thread in threads)


# --- items ahead


def test_items_come_in_order_and_no_more_are_made_than_may_be():
    made = []
    items = Ahead((made.append(i) or i for i in range(10**6)), 3, lambda: None)
    time.sleep(0.3)
    assert made == [0, 1, 2, 3]  # and one that waits for its place
    assert [next(items) for _ in range(10)] == list(range(10))
    time.sleep(0.3)
    assert len(made) == 14
    items.close()
    items.close()


def test_an_error_comes_in_its_turn_and_again():
    def picky():
        yield 1
        raise KeyError("two")

    items = Ahead(picky(), 3, lambda: None)
    assert next(items) == 1
    for _ in range(2):
        with pytest.raises(KeyError, match="two"):
            next(items)


def test_a_thread_that_waits_is_released():
    wait = threading.Event()
    items = Ahead(iter(wait.wait, None), 1, wait.set)
    (thread,) = [part for part in items.close.peek()[2] if isinstance(part, threading.Thread)]
    del items
    thread.join(5)
    assert not thread.is_alive() and wait.is_set()


# --- how runs end


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
