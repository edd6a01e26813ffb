"""SIGTERM and Ctrl-C: they end a run at a point from which it can be resumed."""

import contextlib
import os
import signal
import sys
import threading

# Exit statuses: being stopped by a scheduler is no failure; 130 is what shells use for Ctrl-C.
STATUS = {signal.SIGTERM: 0, signal.SIGINT: 130}


class Stopped(BaseException):
    """The run was asked to stop.

    It is not an Exception, so that no handler between the signal and the command line takes it for an error.

    Attributes:
      status: the exit status for the signal that came.
    """

    def __init__(self, asked: signal.Signals, status: int):
        super().__init__(f"stopped by {asked.name}")
        self.status = status


class Stop:
    """A context in which signals ask the run to stop.

    The first signal raises Stopped wherever the program is; inside `deferred()` it is only noted, and
    `check()` raises Stopped. A second Ctrl-C ends the process at once. A thread does this, since Python's
    own handlers wait while XLA compiles or computes. Outside the main thread signals cannot be caught, and
    this does nothing.

    Args:
      hosts: how many train together. With several only `agree` raises Stopped inside `deferred()`, so that
        all of them stop after the same step.
      on_term: the exit status after SIGTERM.

    Attributes:
      asked: the signal that came, or None.
      step: the last step whose state is saved, 0 for none; the training loop sets it.
    """

    def __init__(self, hosts: int = 1, on_term: int = 0):
        self.statuses = STATUS | {signal.SIGTERM: on_term}
        self.asked, self.step, self.holds, self.alone = None, 0, False, hosts == 1
        self.agreed = self.alone  # whether all hosts know that a signal has come to one

    @property
    def status(self) -> int:
        """The exit status for the signal that came."""
        return self.statuses[self.asked]

    def __enter__(self):
        self.replaced = {}
        if threading.current_thread() is threading.main_thread():
            self.ear, mouth = os.pipe()
            os.set_blocking(mouth, False)
            self.replaced = {number: signal.signal(number, self.note) for number in STATUS}
            self.mouth, self.earlier = mouth, signal.set_wakeup_fd(mouth)
            self.thread = threading.Thread(target=self.listen, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_):
        if self.replaced:
            signal.set_wakeup_fd(self.earlier)
            for number, handler in self.replaced.items():
                signal.signal(number, handler or signal.SIG_DFL)  # JAX's own, with several hosts, has no name
            os.close(self.mouth)
            self.thread.join()
            os.close(self.ear)

    def note(self, number, frame):
        """The handler of a signal: the first one raises Stopped, unless that is deferred."""
        if self.asked is not None:
            return
        self.asked = signal.Signals(number)
        if not self.holds:
            raise Stopped(self.asked, self.status)

    def listen(self):
        """Reads the numbers of signals as they come, in a thread."""
        interrupts = 0
        while byte := os.read(self.ear, 1):
            interrupts += byte[0] == signal.SIGINT
            if byte[0] == signal.SIGINT and interrupts == 1:
                print(
                    "\nCtrl-C: the run comes to a clean end; once more ends it at once",
                    file=sys.stderr,
                    flush=True,
                )
            if interrupts > 1:
                os._exit(STATUS[signal.SIGINT])

    def check(self):
        """Raises Stopped when a signal has come; with several hosts when all of them know."""
        if self.asked and self.agreed:
            raise Stopped(self.asked, self.status)

    def agree(self, asked: list[int | None]):
        """Takes what signal has come to each host; if there is any, raises Stopped on all of them."""
        for number in filter(None, asked):
            self.asked = self.asked or signal.Signals(number)
            self.agreed = True
        self.check()

    @contextlib.contextmanager
    def deferred(self, holds=True):
        """A context in which signals are only noted for `check()`, which is called at its end.

        With `holds=False`, inside such a context, signals raise Stopped again, unless there are several
        hosts.
        """
        before, self.holds = self.holds, holds or (self.holds and not self.alone)
        try:
            if not holds:
                self.check()
            yield
        finally:
            self.holds = before
        self.check()
