"""A last word before the process aborts, as JAX has it do when the first host, with the store, is gone."""

import ctypes
import faulthandler
import signal
from collections.abc import Callable

HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
kept = []  # a handler that Python has forgotten cannot be called


def before_abort(do: Callable[[], None]):
    """Has `do()` called before the process aborts, for whatever reason; it may end the process another way.

    Python's own signal handlers run when the interpreter comes to them, and an abort does not wait for that.
    This one runs at once, in the thread that aborts.
    """

    def handle(number):
        do()
        faulthandler.dump_traceback()

    kept.append(HANDLER(handle))
    ctypes.CDLL(None).signal(signal.SIGABRT, kept[-1])
