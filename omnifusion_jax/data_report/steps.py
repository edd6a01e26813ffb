"""Which records stand in which row of which step of a run."""

import itertools
from collections.abc import Iterator

from omnifusion_jax.config import TrainConfig, check
from omnifusion_jax.data.omitted import Omitted
from omnifusion_jax.data.order import Order
from omnifusion_jax.data.pipeline import Read
from omnifusion_jax.data.readers import Readers, alone
from omnifusion_jax.data.reading import Reading
from omnifusion_jax.data.rows import Rows
from omnifusion_jax.errors import ConfigError


def span(text: str, steps: int) -> range:
    """The steps that FIRST:LAST, or one number alone, means, both of them included; a run has 1 to `steps`.

    Raises:
      ConfigError: it is neither, or the run does not have these steps.
    """
    first, _, last = text.partition(":")
    try:
        found = range(int(first), int(last or first) + 1)
    except ValueError:
        raise ConfigError(f"--steps={text}: two numbers are expected, as in 100:200, or one") from None
    check(
        0 < found.start < found.stop, f"--steps={text}: steps are counted from 1, the first before the last"
    )
    check(found.stop <= steps + 1, f"--steps={text}: the run has {steps} steps (config.steps)")
    return found


def composition(config: TrainConfig, data: Reading, steps: range, processes: int) -> Iterator:
    """Yields (step, rows), the indices of the records in each row, for each of `steps`.

    Records are read as far as that decides which are left out: headers of pictures are enough where a bad
    record ends the run.

    Raises:
      DataError: the run would end here, for this reason.
    """
    c, rows_of_batch = config.data, config.batch_size
    order = Order(data.shares, config.seed, c.shuffle)
    skips = c.on_bad_sample == "skip"
    prepare = data.prepare if skips else data.prepare.outlined()
    read = Read.of(data.source, prepare, data.choose)
    readers = Readers(read, data.prepare.tiles, data.source.where, processes)
    omitted = Omitted(
        len(data.source),
        on_bad=c.on_bad_sample,
        on_long=c.on_long,
        bad_share=c.bad_share,
        drawn=c.shuffle,
        gather=alone,
    )
    rows = Rows(readers, order, rows_of_batch, range(rows_of_batch), data.choose, omitted)
    first = 1
    if not (c.packing or skips or c.on_long == "skip"):  # every step before took one record a row
        first = steps.start
        rows.restore({str(row): [first - 1, 0, []] for row in range(rows_of_batch)})
    try:
        for step in range(first, steps.stop):
            plan = next(rows)
            if step in steps:
                yield step, [[order[n] for n in row] for row in plan]
            for n in itertools.chain.from_iterable(plan):
                readers.drop(n)
    finally:
        readers.close()
