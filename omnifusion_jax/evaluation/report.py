"""report.html of a run: curves, and pictures with question, answer and truth.

It is one file that loads nothing else.
"""

import base64
import html
import io
import json
from pathlib import Path

from omnifusion_jax.data.images import open_image
from omnifusion_jax.paths import located
from omnifusion_jax.training.lines import read_rows
from omnifusion_jax.training.samples import read_samples

SHOWN = 60  # pictures
# Figures that have a curve besides the loss, where there are two of them or more
HELD_OUT = {"eval/loss": "Loss of held-out dialogues", "eval/accuracy": "Right answers to held-out questions"}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 74rem; padding: 0 1rem; \
color: #222; background: #fafafa }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td { padding: .15rem 1.2rem .15rem 0 } \
td + td { font-variant-numeric: tabular-nums }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .8rem }
.card { background: #fff; border: 1px solid #ddd; border-left: .3rem solid #2a8a4a; \
border-radius: .3rem; padding: .6rem; overflow-wrap: anywhere }
.card.wrong { border-left-color: #c43a31 }
.card img { width: 8rem; height: 8rem; object-fit: contain; \
display: block; margin-bottom: .4rem; background: #eee }
.card b { font-weight: 600 } .faint { color: #777 }
svg text { font: 12px system-ui, sans-serif; fill: #666 }
"""


def write_report(workdir: str | Path, records, earlier: str | Path | None = None):
    """Writes WORKDIR/report.html from its metrics.jsonl, samples.jsonl and summary.json.

    Args:
      records: a list of evaluation.exact_match.Records in the order to show; may be empty.
      earlier: the workdir of the phase before, whose loss curve is shown too, or None.
    """
    workdir = located(workdir)
    figures = json.loads((workdir / "summary.json").read_text())
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{show(value)}</td></tr>" for name, value in figures.items()
    )
    runs = [located(run) for run in (earlier, workdir) if run]
    curves = ""
    for run in (run for run in runs if (run / "metrics.jsonl").is_file()):
        points = read_points(run / "metrics.jsonl", "train/loss")
        curves += f"<h2>Loss: {html.escape(run.name)}</h2>{curve(points)}"
    for name, title in HELD_OUT.items():
        points = read_points(workdir / "metrics.jsonl", name)
        curves += f"<h2>{title}</h2>{curve(points)}" if len(points) > 1 else ""
    said = read_samples(workdir / "samples.jsonl")
    cards = "".join(
        card(record, said.get((number, record.question, record.truth), []))
        for number, record in enumerate(records[:SHOWN])
    )
    answers = ""
    if records:
        shown = min(SHOWN, len(records))
        answers = f"<h2>The first {shown} of {len(records)} questions</h2><div class=grid>{cards}</div>"
    title = html.escape(workdir.name)
    body = f"<h1>{title}</h1><table>{rows}</table>{curves}{answers}"
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{STYLE}</style><body>{body}</body></html>"
    )
    (workdir / "report.html").write_text(page, encoding="utf-8")


def show(value) -> str:
    return f"{value:.4f}" if isinstance(value, float) else html.escape(str(value))


def read_points(path: Path, name: str) -> list[tuple[int, float]]:
    """[(step, figure)] of a metrics.jsonl, without steps where it is not finite."""
    return [(row["step"], row[name]) for row in read_rows(path) if name in row]


def curve(points: list[tuple[int, float]], width=900, height=220, left=48, bottom=24) -> str:
    """An SVG line through [(step, loss or another figure)], with a scale from zero."""
    if len(points) < 2:
        return "<p class=faint>fewer than two logged steps</p>"
    last = points[-1][0]
    top = max(loss for _, loss in points) * 1.05 or 1.0
    x = lambda step: left + (width - left - 8) * step / last
    y = lambda loss: 8 + (height - bottom - 8) * (1 - loss / top)
    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    ticks = [top * i / 4 for i in range(5)]
    grid = "".join(
        f'<line x1="{left}" x2="{width}" y1="{y(t):.1f}" y2="{y(t):.1f}" stroke="#e4e4e4"/>' for t in ticks
    )
    scale = "".join(
        f'<text x="{left - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:.2f}</text>' for t in ticks
    )
    marks = ((0, "start"), (last / 2, "middle"), (last, "end"))
    steps = "".join(
        f'<text x="{x(step):.1f}" y="{height - 6}" text-anchor="{anchor}">{step:.0f}</text>'
        for step, anchor in marks
    )
    path = f'<polyline points="{line}" fill="none" stroke="#2b62c4" stroke-width="2"/>'
    style = f"max-width:{width}px;background:#fff"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" style="{style}">{grid}{scale}{steps}{path}</svg>'
    )


def thumbnail(image) -> str:
    """An <img> that holds a small copy of a picture."""
    picture, file = open_image(image), io.BytesIO()
    picture.thumbnail((256, 256))
    picture.save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def card(record, said=()) -> str:
    """A picture with its question, the answer, and the truth when the answer is wrong.

    `said` are its answers [(step, answer)] so far, the last of which is that of the record.
    """
    lines = [
        f"<div>{html.escape(record.question)}</div>",
        f"<div><b>{html.escape(record.answer) or '&nbsp;'}</b></div>",
    ]
    if not record.right:
        lines.append(f"<div class=faint>truth: {html.escape(record.truth)}</div>")
    if record.blind is not None:
        lines.append(f"<div class=faint>to a blank picture: {html.escape(record.blind)}</div>")
    lines += [f"<div class=faint>step {step}: {html.escape(answer)}</div>" for step, answer in said[:-1]]
    wrong = "" if record.right else " wrong"
    picture = "".join(map(thumbnail, record.images[:1]))
    return f"<div class='card{wrong}'>{picture}{''.join(lines)}</div>"
