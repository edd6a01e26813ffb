"""Reads all records while a bar shows how far it came."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from omnifusion_jax.config import DataConfig
from omnifusion_jax.data.reading import Reading
from omnifusion_jax.data_report.gather import Gathered, gather


def read_all(data: Reading, c: DataConfig, processes: int) -> Gathered:
    """All that `processes` processes find, or what they have found when Ctrl-C ends them."""
    columns = TextColumn("{task.completed:,}/{task.total:,} records"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("")
        gathered, sweep = gather(data, c, processes, lambda records: progress.advance(task, records))
        progress.update(task, total=gathered.records)
        try:
            sweep.wait()
        except KeyboardInterrupt:
            sweep.close()
    return gathered
