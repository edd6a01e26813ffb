"""Hosts as threads that share a store in memory: what they tell each other, and how they end together."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from omnifusion_jax.errors import DataError, HostError
from omnifusion_jax.hosts import company
from omnifusion_jax.hosts.company import Company


class Memory:
    """What store.Store promises, among threads."""

    def __init__(self):
        self.values, self.changed, self.up = {}, threading.Condition(), True

    def reachable(self):
        return self.up

    def put(self, key, value):
        assert isinstance(value, str)
        with self.changed:
            self.check()
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key, seconds):
        with self.changed:
            self.check()
            if not self.changed.wait_for(lambda: key in self.values, seconds):
                raise TimeoutError(key)
            return self.values[key]

    def all(self, folder):
        with self.changed:
            self.check()
            found = {key: value for key, value in self.values.items() if key.rpartition("/")[0] == folder}
            return {key.rpartition("/")[2]: value for key, value in found.items()}

    def remove(self, folder):
        with self.changed:
            for key in [key for key in self.values if key.startswith(f"{folder}/")]:
                del self.values[key]

    def check(self):
        if not self.up:
            raise ConnectionError


@pytest.fixture
def hosts(monkeypatch):
    monkeypatch.setattr(company, "PATIENCE", 0.5)
    store = Memory()
    return [Company(store, number, 3, silence=60.0, leave=lambda status: None) for number in range(3)]


def together(hosts, *things, about="run"):
    """What each host gets, or raises, when each gives its thing; None: it does not come."""

    def one(host, thing):
        try:
            return host.gather(thing, about) if thing is not None else None
        except HostError as error:
            return error

    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(one, hosts, things))


def test_all_get_what_each_has_given_in_order_of_hosts(hosts):
    for n in range(4):
        things = [{"host": i, "round": n} for i in range(3)]
        assert together(hosts, *things) == [things] * 3


def test_what_two_threads_speak_of_does_not_mix(hosts):
    with ThreadPoolExecutor(2) as pool:
        rounds = [
            pool.submit(
                lambda about=about: [together(hosts, *[[about, n]] * 3, about=about) for n in range(20)]
            )
            for about in ("run", "data")
        ]
        for about, found in zip(("run", "data"), rounds, strict=True):
            assert found.result() == [[[[about, n]] * 3] * 3 for n in range(20)]


def test_rounds_that_are_over_are_forgotten(hosts):
    for n in range(10):
        together(hosts, n + 1, n + 1, n + 1)
    assert {key.split("/")[1] for key in hosts[0].store.values} == {"9"}


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_of_one_host_is_raised_on_all_others(hosts, failing):
    things = [1, 1, 1]
    things[failing] = DataError("line 7 is no JSON")
    found = together(hosts, *things)
    assert found.pop(failing) == []  # it raises its own, and waits for nobody
    assert [str(error) for error in found] == [f"host {failing}: line 7 is no JSON"] * 2


def test_a_host_that_does_not_come_is_named_to_the_others(hosts):
    first, second, _ = together(hosts, 1, 1, None)
    assert str(first) == str(second)
    assert "host 2 is alive but did not come to 'run/0'" in str(first) and "The same command" in str(first)


def sees(host, beats, ends, now):
    said = {i: json.dumps({"status": status, "message": message}) for i, (status, message) in ends.items()}
    return host.notice({str(i): str(beat) for i, beat in beats.items()}, said, now)


def test_a_host_without_a_sign_of_life_is_named(hosts):
    one = hosts[1]
    one.heard = {0: 0.0, 2: 0.0}
    assert sees(one, {0: 1, 2: 1}, {}, 10) is None
    assert sees(one, {0: 2, 2: 1}, {}, 70) is None  # host 2 was heard at 10
    status, message = sees(one, {0: 3, 2: 1}, {}, 70.5)
    assert status == 1 and "host 2 has given no sign of life for 60 s" in message


@pytest.mark.parametrize(("status", "said"), [(0, "stopped by SIGTERM"), (1, "line 7 is no JSON")])
def test_a_host_ends_with_the_status_and_message_of_the_one_that_ended(hosts, status, said):
    one, ends = hosts[1], {"2": (status, said)}
    one.heard = {0: 0.0, 2: 0.0}
    assert sees(one, {0: 1, 2: 1}, ends, 5) is None
    assert sees(one, {0: 2, 2: 1}, ends, 5 + company.GRACE - 0.1) is None  # time to end by itself
    assert sees(one, {0: 3, 2: 1}, ends, 5 + company.GRACE) == (status, f"host 2 ended the run: {said}")


def watched(monkeypatch, silence):
    """Three hosts that watch each other, and the list of (number, status) of those that left."""
    monkeypatch.setattr(company, "BEAT", 0.02)
    monkeypatch.setattr(company, "GRACE", 0.2)
    monkeypatch.setattr(company.atexit, "register", lambda *_: None)
    store, left = Memory(), []

    def leave(number, status):
        left.append((number, status))
        hosts[number].over.set()

    hosts = [Company(store, i, 3, silence, lambda status, i=i: leave(i, status)) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(Company.begin, hosts))
    return hosts, left


def until(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_when_one_dies_the_others_leave_and_name_it(monkeypatch, capsys):
    hosts, left = watched(monkeypatch, silence=1.5)
    hosts[1].over.set()  # its thread ends, as with a process that is killed
    until(lambda: len(left) == 2)
    assert sorted(left) == [(0, 1), (2, 1)] and left[-1][0] == 0  # the first keeps the store, and goes last
    said = capsys.readouterr().err
    assert (
        said.count(f"{hosts[1].names[1]} has given no sign of life") == 2 and "(process " in hosts[1].names[1]
    )


def test_what_follows_from_the_error_of_another_host_is_told_as_that(monkeypatch):
    hosts, left = watched(monkeypatch, silence=5.0)
    assert isinstance(hosts[2].end(DataError("line 7 is no JSON")), DataError)
    found = hosts[0].end(RuntimeError("connection closed by peer"))
    assert isinstance(found, HostError) and str(found).endswith("ended the run: line 7 is no JSON")
    until(lambda: (1, 1) in left)
    for host in hosts:
        host.over.set()


def test_a_host_that_comes_to_no_end_is_ended(monkeypatch):
    """As when a thread of Orbax waits for a host that is no more, and Python for the thread."""
    hosts, left = watched(monkeypatch, silence=5.0)
    hosts[2].end(DataError("line 7 is no JSON"))
    until(lambda: (2, 1) in left)
    for host in hosts:
        host.over.set()


def test_when_the_store_is_gone_so_is_the_first_host(monkeypatch, capsys):
    hosts, left = watched(monkeypatch, silence=5.0)
    hosts[0].over.set()
    hosts[0].store.up = False
    until(lambda: len(left) == 2)
    assert sorted(left) == [(1, 1), (2, 1)]
    assert capsys.readouterr().err.count(f"{hosts[0].names[0]} cannot be reached") == 2


def test_a_beat_from_before_the_death_of_its_host_is_no_sign_of_life(hosts, monkeypatch):
    """Host 0 beats, host 2 breaks off what all do, and host 1 asks what the store holds, in this order."""
    monkeypatch.setattr(company, "BEAT", 0.02)
    one = hosts[1]
    waiting = threading.Thread(target=one.all_heard, daemon=True)
    waiting.start()

    def store_holds(beats):
        one.said, one.asked = (beats, {}), time.monotonic()
        time.sleep(0.1)

    store_holds({"0": "5", "2": "5"})  # new to host 1, and nothing says that they were put after it asked
    assert waiting.is_alive()
    store_holds({"0": "6", "2": "5"})
    assert waiting.is_alive()
    store_holds({"0": "6", "2": "6"})
    waiting.join(5)
    assert not waiting.is_alive()


def test_a_host_that_is_about_to_end_says_so_too_when_the_first_is_gone(monkeypatch, capsys):
    """Its own error may only follow from that, as a collective that breaks off, and is not printed yet."""
    hosts, left = watched(monkeypatch, silence=5.0)
    hosts[2].say_farewell(75, "connection closed by peer")
    hosts[2].aborted()
    assert left == []  # the store is there
    hosts[2].store.up = False
    hosts[2].aborted()
    hosts[0].aborted()  # it is the first
    assert left == [(2, 75)]
    assert f"{hosts[0].names[0]} cannot be reached" in capsys.readouterr().err
    for host in hosts:
        host.over.set()
