"""The processes that train together, called hosts: who they are, what they tell each other, how they end.

Several hosts may be on one machine. A run of one process is the usual case: then nothing is started, and
every function here gives the obvious answer.
"""

import contextlib
import os
import sys

import jax
from jax.experimental import multihost_utils

from omnifusion_jax.errors import HostError
from omnifusion_jax.hosts.abort import before_abort
from omnifusion_jax.hosts.company import SILENCE, Alone, Company
from omnifusion_jax.hosts.environment import arguments
from omnifusion_jax.hosts.store import Store

CONNECTING = 300  # seconds in which all hosts must have been started
JAX_WAITS = 60  # seconds that JAX waits longer for a host than is done here, where it is named

here = Alone()  # the Company that this process belongs to


@contextlib.contextmanager
def started(address: str = "", number: int | None = None, count: int | None = None, silence: float = SILENCE):
    """A context in which this process is one of several hosts, if it was started as one of them.

    Its standard output is closed unless it is the first, so that everything is said once. However it ends,
    the other hosts end too: within `company.GRACE` seconds of an error, whose message they repeat; within
    `silence` seconds when this process dies or hangs.

    Args:
      address: "name:port" of the first host. None of these three are needed where
        `environment.arguments` finds them.
      number: of this host, from 0.
      count: of all hosts.
      silence: seconds without a sign of life after which a host is given up.
    Raises:
      ConfigError: the arguments do not go together.
      HostError: the hosts did not find each other, or another one ended.
    """
    global here
    found = arguments(address, number, count, os.environ)
    if found is None:
        yield
        return
    connect(found, silence)
    here = Company(Store(), jax.process_index(), jax.process_count(), silence)
    here.begin()
    before_abort(here.aborted)
    if not first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  it stays open to the end
    try:
        yield
        barrier()
    except BaseException as error:
        cause = here.end(error)
        if cause is error:
            raise
        raise cause from error
    here.close()
    here = Alone(here.number, here.count)
    jax.distributed.shutdown()


def connect(found: dict, silence: float):
    """Starts jax.distributed with the arguments `found`. Raises HostError when that fails."""
    try:
        jax.distributed.initialize(
            **found,
            initialization_timeout=CONNECTING,
            heartbeat_timeout_seconds=round(silence + JAX_WAITS),
            shutdown_timeout_seconds=JAX_WAITS,
        )
    except (RuntimeError, ValueError) as error:
        given = ", ".join(f"{name}={value}" for name, value in found.items()) or "what the environment says"
        raise HostError(
            f"the hosts did not find each other with {given}: {error}\nStart the same command on all of them "
            f"within {CONNECTING} s, and see to it that each can reach the first"
        ) from error


def number() -> int:
    """The number of this host, from 0."""
    return here.number


def count() -> int:
    """How many hosts there are."""
    return here.count


def first() -> bool:
    """Whether this host is the one that writes and prints."""
    return here.number == 0


def name(number: int) -> str:
    """A host as messages call it."""
    return here.names[number]


def gather(thing, about: str = "run") -> list:
    """What each host has given, by number. Every host calls this at the same points.

    Args:
      thing: small, and comes back as JSON has it. An Exception is raised on all other hosts, as a HostError,
        and nothing is waited for.
      about: hosts that speak of several things in different threads give each of them a name.
    Raises: HostError: another host gave an Exception, or did not come.
    """
    return here.gather(thing, about)


def barrier():
    """Waits until every host is here."""
    gather(None)


def by_first(work):
    """What `work()` gives on the first host, where alone it runs, on all of them.

    Raises: what `work` raises; on the other hosts a HostError that says the same.
    """
    if not first():
        return gather(None)[0]
    try:
        found = work()
    except Exception as error:
        gather(error)
        raise
    return gather(found)[0]


def fetch(tree):
    """The arrays of a tree as NumPy arrays, whole on every host, however they are spread over devices."""
    if count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
