"""Traces of a few steps for xprof and TensorBoard."""

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import jax

from omnifusion_jax import hosts
from omnifusion_jax.config import check
from omnifusion_jax.training.mirror import Mirror
from omnifusion_jax.training.workdir import writing


class Span(NamedTuple):
    """The steps that are traced, both included."""

    first: int
    last: int

    @classmethod
    def read(cls, text: str) -> "Span":
        """From FIRST:LAST, or one number. Raises: ConfigError."""
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        check(match is not None, f"--profile={text}: give steps as --profile=10:20, or one as --profile=10")
        return cls(int(match[1]), int(match[2] or match[1]))

    def inside(self, steps: int) -> "Span":
        """Itself. Raises: ConfigError when a run of so many steps does not have them all."""
        check(
            0 < self.first <= self.last <= steps,
            f"--profile={self.first}:{self.last}: the run has the steps 1 to {steps}",
        )
        return self


class Trace:
    """Traces the steps of a Span into WORKDIR/profile; of several hosts the first does, with its devices.

    A run that goes on within the span traces what is left of it, and one that goes on behind it says so.

    Args:
      span: None: nothing is traced.
      begun: the step that the run goes on from.
      pause: makes a context whose time is not that of a step.
    """

    def __init__(self, workdir: Path, span: Span | None, begun: int, pause):
        self.workdir, self.span, self.pause, self.mirror = workdir, span, pause, None
        if span and begun >= span.last:
            print(f"--profile={span.first}:{span.last}: these steps are done, nothing is traced", flush=True)
        self.first = max(span.first, begun + 1) if span and hosts.first() else None

    def before(self, step: int, state):
        """Begins the trace if `step` is the first of the span; `state` is that of the step before."""
        if step != self.first or step > self.span.last:
            return
        jax.block_until_ready(state)  # of which nothing should be seen
        with self.pause(), writing(self.workdir):
            self.mirror = Mirror(self.workdir / "profile")
            jax.profiler.start_trace(self.mirror.here)

    def during(self, step: int) -> AbstractContextManager:
        """The context in which a step is begun: it has its number in the trace."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, state):
        """Ends the trace if `step` is the last of the span; `state` is its result."""
        if self.mirror and step == self.span.last:
            jax.block_until_ready(state)
            self.close(step)

    def close(self, step: int):
        """Ends the trace if there is one; `step` is the last that was done."""
        if not self.mirror:
            return
        with self.pause(), writing(self.workdir):
            jax.profiler.stop_trace()
            self.mirror.close()
        self.mirror = None
        where = f"{self.workdir / 'profile'}; xprof and TensorBoard show it"
        print(f"the trace of steps {self.first} to {step} is in {where}", flush=True)
