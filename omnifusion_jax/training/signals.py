"""SIGTERM and Ctrl-C: a run ends at a place from which it can go on."""

import contextlib
import os
import signal
import sys
import threading

STATUS = {
    signal.SIGTERM: 0,
    signal.SIGINT: 130,
}  # a scheduler's stop is no failure; 130 is the shell's word for Ctrl-C


class Stopped(BaseException):
    """The run was asked to stop. Not an Exception: nobody between the signal and the command line takes it for an error."""


class Stop:
    """A context in which signals ask the run to stop.

    Ordinarily the first signal raises Stopped wherever the program is. Inside `deferred()` it is only noted, and `check()` raises it.
    A second Ctrl-C ends the process at once; a thread sees to that, since Python's own handlers wait while XLA compiles or computes.
    Outside the main thread signals cannot be caught, and nothing is changed.

    asked: the signal that came, or None. step: the last step whose state is saved, 0 for none; the loop keeps it.
    """

    def __init__(self):
        self.asked, self.step, self.holds = None, 0, False

    @property
    def status(self):
        """The exit status that fits the signal."""
        return STATUS[self.asked]

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
                signal.signal(number, handler)
            os.close(self.mouth)
            self.thread.join()
            os.close(self.ear)

    def note(self, number, frame):
        first, self.asked = self.asked is None, self.asked or signal.Signals(number)
        if first and not self.holds:
            raise Stopped

    def listen(self):
        """Reads the numbers of signals as they come."""
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
        """Raises Stopped when a signal came."""
        if self.asked:
            raise Stopped

    @contextlib.contextmanager
    def deferred(self, holds=True):
        """In here signals are noted for `check()`; with `holds=False`, inside such a block, they raise again. Ends with a check."""
        before, self.holds = self.holds, holds
        try:
            if not holds:
                self.check()
            yield
        finally:
            self.holds = before
        self.check()
