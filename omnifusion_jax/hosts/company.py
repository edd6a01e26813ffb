"""What hosts tell each other while they train, and how they end together.

Hosts speak through a store of text, not through their devices: a thread may then speak while another runs
collectives. (Two threads that began collectives in another order on another host would wait for ever.)

    beat/NUMBER         a count that goes on every `BEAT` seconds while the process lives
    ABOUT/ROUND/NUMBER  what a host gives to a round of `gather`; .../all is what comes back, by the first
    end/NUMBER          a host is about to end, with an exit status, and why
    gone/NUMBER         it has nothing more to say; the first host, which keeps the store, ends last
"""

import atexit
import collections
import contextlib
import json
import os
import socket
import sys
import threading
import time

from omnifusion_jax.errors import HostError, OmniFusionError

BEAT = 1.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one, after which a host is given up
GRACE = 10.0  # seconds that a host is given to end by itself when another one has
PATIENCE = 1800.0  # seconds that a host may take to come to where all meet, though it gives signs of life
AGAIN = "The same command, on all hosts, goes on from the last checkpoint"


class Alone:
    """The company of a host that has nobody to speak to: it is the only one, or all have said farewell."""

    def __init__(self, number: int = 0, count: int = 1):
        self.number, self.count, self.names = number, count, [f"host {i}" for i in range(count)]

    def gather(self, thing, about):
        return [thing] * self.count


class Company:
    """The hosts of a run, as one of them sees the others.

    Args:
      store: as store.Store.
      leave: ends the process with a status, whatever its threads are doing.
    """

    def __init__(self, store, number: int, count: int, silence: float, leave=os._exit):
        self.store, self.number, self.count, self.silence, self.leave = store, number, count, silence, leave
        self.names = [f"host {i}" for i in range(count)]
        self.rounds = collections.Counter()
        self.beats, self.heard, self.ends = {}, {}, {}  # by number: the last beat, when it came, why it ends
        self.said, self.asked = ({}, {}), 0.0  # what the store last held of beats and ends, and since when
        self.ending, self.over = None, threading.Event()  # (exit status, until when at the latest)

    def begin(self):
        """Learns the names of all, and begins to watch them."""
        self.names = self.gather(
            f"host {self.number} (process {os.getpid()} on {socket.gethostname()})", "names"
        )
        self.asked = time.monotonic()
        self.heard = dict.fromkeys(self.others, self.asked)
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self.talk, self.watch)]
        for thread in self.threads:
            thread.start()

    @property
    def others(self):
        return [i for i in range(self.count) if i != self.number]

    def gather(self, thing, about):
        """See hosts.gather. The first host collects, so that a round costs each of them three messages."""
        number, self.rounds[about] = self.rounds[about], self.rounds[about] + 1
        room, collects = f"{about}/{number}", self.number == 0
        failed = isinstance(thing, Exception)
        word = json.dumps({"error": f"{self.names[self.number]}: {thing}"} if failed else {"given": thing})
        if failed:
            self.store.put(f"{room}/{'all' if collects else self.number}", word)
            return []
        try:
            self.store.put(f"{room}/{self.number}", word)
            if collects:
                self.store.put(f"{room}/all", json.dumps(self.collected(room)))
                # whoever came to this round has read the one before
                self.store.remove(f"{about}/{number - 1}")
            found = json.loads(self.store.get(f"{room}/all", PATIENCE + GRACE))
        except (ConnectionError, TimeoutError) as error:
            raise HostError(f"{self.names[0]} cannot be reached. {AGAIN}") from error
        if "error" in found:
            raise HostError(found["error"])
        return found["given"]

    def collected(self, room):
        """What all hosts gave to a round, or the first error."""
        given, until = [], time.monotonic() + PATIENCE
        for i in range(self.count):
            try:
                word = json.loads(self.store.get(f"{room}/{i}", max(1.0, until - time.monotonic())))
            except TimeoutError:
                missed = f"{self.names[i]} is alive but did not come to {room!r} for {PATIENCE:.0f} s"
                return {"error": f"{missed}: it hangs. {AGAIN}"}
            if "error" in word:
                return word
            given.append(word["given"])
        return {"given": given}

    def talk(self):
        """Tells the others every `BEAT` seconds that this host lives, and asks for what they say."""
        beat = 0
        while not self.over.wait(BEAT):
            beat += 1
            with contextlib.suppress(ConnectionError, TimeoutError):  # or it waits, when the first host hangs
                self.store.put(f"beat/{self.number}", str(beat))
                asked = time.monotonic()
                self.said = self.store.all("beat"), self.store.all("end")
                self.asked = asked

    def watch(self):
        """Ends this process when another has ended, or gives no sign of life."""
        while not self.over.wait(BEAT):
            now = time.monotonic()
            verdict = self.notice(*self.said, now)
            if self.ending:
                if now > self.ending[1]:
                    self.leave(self.ending[0])  # something waits for a host that is no more
            elif now - self.asked > self.silence:
                self.lose_first()
            elif verdict:
                self.give_up(*verdict)

    def lose_first(self):
        """Ends this process since the first host, with the store, is gone; its own status comes first."""
        message = f"{self.names[0]} cannot be reached: it died, hangs, or the network is down. {AGAIN}"
        print(f"{self.names[self.number]} ends: {message}", file=sys.stderr, flush=True)
        self.leave(self.ending[0] if self.ending else 1)

    def aborted(self):
        """JAX, or something else, is about to abort this process. The store may not be asked here."""
        if self.number and not self.over.is_set() and not self.store.reachable():
            self.lose_first()

    def notice(self, beats: dict[str, str], ends: dict[str, str], now: float):
        """Takes in what the others say: (status, message) when this process must end for it, else None."""
        for i in self.others:
            if beats.get(str(i)) != self.beats.get(i):
                self.beats[i], self.heard[i] = beats.get(str(i)), now
            if str(i) in ends and i not in self.ends:
                self.ends[i] = json.loads(ends[str(i)]) | {"seen": now}
        for i, end in self.ends.items():
            if now - end["seen"] >= GRACE:
                return end["status"], f"{self.names[i]} ended the run: {end['message']}"
        for i in self.others:
            if i not in self.ends and now - self.heard[i] > self.silence:
                told = f"{self.names[i]} has given no sign of life for {self.silence:.0f} s"
                return 1, f"{told}: it died, hangs or cannot be reached. {AGAIN}"
        return None

    def end(self, error: BaseException) -> BaseException:
        """Tells the others that this host ends by `error`, and has the process end so that they can, too.

        An error of JAX or of Python may only follow from another host's end, like a collective that broke
        off; then that is found out first. Returns: the error to raise.
        """
        if not isinstance(error, OmniFusionError) and not hasattr(error, "status"):
            self.all_heard()
            for i, end in self.ends.items():
                if end["status"]:
                    error = HostError(f"{self.names[i]} ended the run: {end['message']}")
        self.say_farewell(getattr(error, "status", 1), f"{error}" or type(error).__name__)
        return error

    def all_heard(self):
        """Waits until every other host has given a sign of life or an end; `watch` sees to silent ones.

        A beat that is new here may be older than the death of its host, so that another one has to follow.
        """
        since = time.monotonic()
        while self.asked <= since:
            time.sleep(BEAT / 10)
        before, _ = self.said
        unheard = lambda i: self.said[0].get(str(i)) == before.get(str(i))
        while any(unheard(i) and i not in self.ends for i in self.others):
            time.sleep(BEAT / 10)

    def say_farewell(self, status: int, message: str):
        self.ending = status, time.monotonic() + 3 * GRACE
        # a host that others must not wait for skips what JAX does at the end, which is to wait for them
        atexit.register(self.go, status)
        with contextlib.suppress(ConnectionError):  # nobody is left to be told
            self.store.put(f"end/{self.number}", json.dumps({"status": status, "message": message}))

    def give_up(self, status: int, message: str):
        """Ends this process now; its main thread may wait for a host that is no more."""
        print(f"{self.names[self.number]} ends: {message}", file=sys.stderr, flush=True)
        self.say_farewell(status, message)
        self.go(status)

    def go(self, status: int):
        """Leaves. The first host waits for the others, `GRACE` and a little at most."""
        try:
            self.store.put(f"gone/{self.number}", "")
            until = time.monotonic() + 2 * GRACE
            silent = lambda i: time.monotonic() - self.heard[i] > self.silence
            while self.number == 0 and time.monotonic() < until:
                gone = self.store.all("gone")
                if all(str(i) in gone or silent(i) for i in self.others):
                    time.sleep(BEAT / 2)  # between its last word and its end
                    break
                time.sleep(BEAT / 10)
        except ConnectionError:
            pass
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.leave(status)

    def close(self):
        """All hosts have come to a good end: nobody is watched any more."""
        self.over.set()
        for thread in self.threads:
            thread.join()
