"""What was asked for last is kept."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any


class Recent:
    """A function that keeps its last results; in threads it is called once for each, and the others wait.

    Pickled without what it keeps.
    """

    def __init__(self, make: Callable[..., Any], size: float):
        """
        Args:
          make: the function; what it raises is raised, and not kept.
          size: how many results are kept.
        """
        self.make, self.size = make, size
        self.lock, self.results = threading.Lock(), OrderedDict()

    def __getstate__(self):
        return {"make": self.make, "size": self.size}

    def __setstate__(self, state):
        self.__init__(**state)

    def __call__(self, *key: Hashable) -> Any:
        with self.lock:
            known = key in self.results
            result = self.results.setdefault(key, Future())
            self.results.move_to_end(key)
            if len(self.results) > self.size:
                self.results.popitem(last=False)
        if not known:
            try:
                result.set_result(self.make(*key))
            except BaseException as error:
                with self.lock:
                    self.results.pop(key, None)
                result.set_exception(error)
        return result.result()
