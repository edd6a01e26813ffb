"""Results come in order, a few ahead; what kills a worker process costs one result."""

import os
import subprocess
import threading
import time

import pytest

from omnifusion_jax.jobs.ahead import ahead


def squares(portion):
    return [i * i for i in portion]


def deadly(portion):
    """As a decoder that crashes at some pictures does."""
    if 5 in portion or 11 in portion:
        os._exit(3)
    return squares(portion)


def portions(count, size=4):
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


def died(i, error):
    return f"{i}: {error}"


def children():
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return set(listed.stdout.split())


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_nothing_is_left_behind(workers):
    before = threading.active_count()
    with_squares = ahead(squares, portions(30), workers, 3, died)
    assert list(with_squares) == [(i, i * i) for i in range(30)]
    begun = ahead(squares, portions(30), workers, 3, died)
    assert [next(begun) for _ in range(5)][-1] == (4, 16)
    begun.close()
    until = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_no_more_is_read_than_is_asked_for_and_a_few_portions():
    read = []

    def watched():
        for portion in portions(400):
            read.append(portion)
            yield portion

    results = ahead(squares, watched(), 0, 3, died)
    assert next(results) == (0, 0) and len(read) == 4
    for _ in range(4):
        next(results)
    assert len(read) == 5


def test_what_kills_a_worker_costs_one_result():
    found = dict(ahead(deadly, portions(14), 2, 2, died))
    killed = {i: result for i, result in found.items() if isinstance(result, str)}
    assert {i: i * i for i in range(14)} == found | {i: i * i for i in killed}
    assert set(killed) == {5, 11} and all("ended with status 3" in said for said in killed.values())


def test_an_error_of_the_function_comes_with_its_traceback():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(ahead(lambda portion: [1 // 0 for _ in portion], portions(4), 1, 2, died))
