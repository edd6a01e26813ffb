"""report.html: one file that loads nothing else and runs nothing; whatever data says is text in it."""

from collections.abc import Iterable
from pathlib import Path

import jinja2

from omnifusion_jax.data_report import plots, table
from omnifusion_jax.data_report.examples import Example

FOLDER = Path(__file__).parent


def page(report: dict, examples: Iterable[tuple[str, list[Example]]]) -> str:
    """The page of a report, as `report.report` makes it, with the examples of each set."""
    loader = jinja2.FileSystemLoader(FOLDER)
    # Everything is escaped, whatever its name: what a data set holds may be meant to harm.
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    drawn = plots.can_draw()
    return environment.get_template("page.html.jinja").render(
        report=report,
        examples=dict(examples),
        charts={name: charts(one) for name, one in report["sets"].items()} if drawn else {},
        drawn=drawn,
        tables={"sets": table.sets(report), "fill": table.filled(report["fill"])},
        repeats=table.repeats(report),
    )


def charts(figures: dict) -> list[tuple[str, str]]:
    """(title, data URL) of what is drawn of a set."""
    lengths, found = figures["tokens"], []
    if lengths:
        width = lengths["width"]
        bins = {
            f"{k * width + 1:,} to {(k + 1) * width:,}": count for k, count in enumerate(lengths["counts"])
        }
        found.append(("Tokens of a dialogue", plots.bars(bins, "dialogues")))
    for title, counts, label in (
        ("Sizes of pictures", figures["pictures"]["sizes"], "pictures"),
        ("Tiles of pictures", figures["pictures"]["tiles"], "pictures"),
        ("Scripts of answers", figures["scripts"], "share of the answers"),
    ):
        if any(counts.values()):
            named = {str(name): count for name, count in counts.items()}
            found.append((title, plots.bars(named, label)))
    return found
