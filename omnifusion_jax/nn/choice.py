"""Which kernel computes attention: what is asked of it, what it refuses, and the choice among several."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple, Self

import jax

from omnifusion_jax.config import check
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.tables import KERNELS

AUTO = ("splash", "cudnn", "triton", "dense")  # what "auto" tries, in this order,
DECODING = ("paged", "loops", "few", "dense")  # and where answers are written, one token after the other


class Need(NamedTuple):
    """What is asked of a kernel, as far as it is known before the program runs."""

    dtype: str
    head_dim: int
    queries: int  # length of the sequence of queries
    keys: int  # and of that of keys
    # what a query does not see within its segment: "nothing", "later" tokens, later "blocks" of tokens, or
    # "others" than a mask names
    hidden: str
    packed: bool  # a row may hold several segments
    window: int | None  # None: none, or one that hides nothing
    dropout: float
    cache: bool  # keys are of other places than queries

    def __str__(self):
        said = [f"{self.queries} x {self.keys}", f"head_dim {self.head_dim}"]
        said += {"nothing": [], "later": ["causal"], "blocks": ["blocks"], "others": ["mask"]}[self.hidden]
        said += ["packed"] * self.packed + ["cache"] * self.cache
        said += [f"window {self.window}"] if self.window else []
        said += [f"dropout {self.dropout}"] if self.dropout else []
        return ", ".join([*said, self.dtype])


class Kernel(NamedTuple):
    """A row of `tables.KERNELS`."""

    run: Callable  # takes the arguments of `attend.attend`, and returns an array of q's shape
    # maps a Need to what the kernel cannot do of it, in a few words, or to None if it can do all
    refuses: Callable[[Need], str | None] = lambda need: None
    platform: str | None = None  # of the devices that it is for; None: all


class Choice:
    """Kernels in order of preference, of which attention takes the first that can do what is asked of it.

    Args:
      packed: whether a row may hold several segments. False promises one that begins at the first position,
        then padding; what is traced cannot tell, and some kernels need to know.
      tell: called with a line that says which kernels were taken, and why not those before them, each time
        that a program with something new in it was traced.
    """

    def __init__(self, *kernels: str, packed: bool = True, tell: Callable[[str], None] | None = None):
        self.kernels, self.packed, self.tell = kernels, packed, tell
        self.taken = {}  # {Need: (kernel, {kernel before it: why not})}
        self.elsewhere = {}  # {kernel: the platform that it is for}, of those that were not asked

    def __eq__(self, other):  # two that say the same are one to `jax.jit`, which compiles once for both
        return isinstance(other, Choice) and (self.kernels, self.packed) == (other.kernels, other.packed)

    def __hash__(self):
        return hash((self.kernels, self.packed))

    @classmethod
    def of(cls, setting: str, platform: str, auto: tuple[str, ...] = AUTO, **promises) -> Self:
        """The choice that the setting `attention` leaves on devices of a platform: "cpu", "gpu" or "tpu".

        `auto` is what "auto" tries.

        Raises:
          ConfigError: the kernel is unknown, or is for other devices.
        """
        names = auto if setting == "auto" else (setting,)
        elsewhere = {name: KERNELS[name].platform for name in names}
        elsewhere = {name: home for name, home in elsewhere.items() if home not in (None, platform)}
        check(
            setting not in elsewhere,
            f"attention={setting} is for {elsewhere.get(setting)} devices, and these are {platform}. "
            "Set attention=auto, which takes what these can do best",
        )
        choice = cls(*(name for name in names if name not in elsewhere), **promises)
        choice.elsewhere = elsewhere
        return choice

    def take(self, need: Need) -> Kernel:
        """The first kernel that can do what is needed. Raises ConfigError when there is none."""
        reasons = {}
        for name in self.kernels:
            reasons[name] = KERNELS[name].refuses(need)
            if reasons[name] is None:
                self.taken[need] = name, {before: why for before, why in reasons.items() if why}
                return KERNELS[name]
        able = [name for name in KERNELS.names() if KERNELS[name].refuses(need) is None]
        refused = " and ".join(f"{name!r} has no {why}" for name, why in reasons.items())
        raise ConfigError(
            f"attention kernel {refused} ({need}). {' and '.join(able)} can do it; "
            "attention=auto takes for each part of a model what can"
        )

    def line(self, since: int = 0) -> str:
        """What was taken, and why not what comes before it; without the first `since` of them."""
        said = []
        for need, (name, reasons) in list(self.taken.items())[since:]:
            why = "".join(f"; {before} has no {reason}" for before, reason in reasons.items())
            said.append(f"{name} ({need}{why})")
        if not since:
            said += [f"{name} is for {platform}" for name, platform in self.elsewhere.items()]
        return f"attention: {'; '.join(said)}"


# Part of what `jax.jit` keeps its programs by, so that another choice is another program
NOW = jax.make_user_context(Choice("dense"))


@contextlib.contextmanager
def using(choice: Choice | str):
    """Attention that is traced in this context takes one of these kernels; elsewhere it is dense.

    A kernel that is named must do all of it: what it cannot do is refused.
    """
    choice = Choice(choice) if isinstance(choice, str) else choice
    known = len(choice.taken)
    with NOW(choice):
        yield choice
    if choice.tell and len(choice.taken) > known:
        choice.tell(choice.line(known))
