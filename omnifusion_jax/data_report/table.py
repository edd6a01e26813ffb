"""The report as text for a terminal."""

from collections.abc import Iterable, Sequence

GAP = "   "


def text(report: dict) -> str:
    """All of a report, as `report.report` makes it, but for its examples."""
    parts = [sets(report), filled(report["fill"]), repeats(report), problems(report)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def header(read_with: dict) -> str:
    """What the data is read with, in a line."""
    layouts = read_with["layouts"]
    named = ", ".join(f"{printable(name)}: {layout}" for name, layout in layouts.items())
    layout = named if len(set(layouts.values())) > 1 else next(iter(layouts.values()))
    return (
        f"tokenizer {read_with['tokenizer']} ({read_with['tokens']:,} tokens), layout {layout}, "
        f"max_length {read_with['max_length']:,}"
    )


def sets(report: dict) -> list[str]:
    """A column for each set, and for all of several."""
    columns = dict(report["sets"])
    if len(columns) > 1:
        columns["all"] = report["all"]
    each = list(columns.values())
    rows = [("", *map(printable, columns))]
    rows += [
        ("records", *(number(one["records"]) + ("" if one["of"] else " of many") for one in each)),
        ("  usable", *(number(one["usable"]) for one in each)),
        ("  too long, left out", *(number(one["too_long"]) for one in each)),
        ("  cut", *(number(one["cut"]) for one in each)),
        ("  cut or left out", *(percent(one["lost"]) for one in each)),
    ]
    reasons = dict.fromkeys(reason for one in each for reason in one["skipped"])
    rows += [
        (f"  problem: {reason}", *(number(one["skipped"].get(reason, 0)) for one in each))
        for reason in reasons
    ]
    unread = dict.fromkeys(key for one in each for key in one["unread"])
    rows += [
        (f"  nothing reads: {printable(key)}", *(number(one["unread"].get(key, 0)) for one in each))
        for key in unread
    ]
    for name in ("smallest", "median", "p95", "largest"):
        rows.append((f"tokens, {name}", *(number((one["tokens"] or {}).get(name)) for one in each)))
    rows += histogram([one["tokens"] for one in each])
    rows.append(("pictures", *(number(one["pictures"]["number"]) for one in each)))
    for name, unit in (("sizes", "pixels"), ("tiles", "tiles")):
        found = dict.fromkeys(key for one in each for key in one["pictures"][name])
        for key in found:
            counts = (one["pictures"][name].get(key, 0) for one in each)
            rows.append((f"  {unit}: {key}", *map(number, counts)))
    for script in each[0]["scripts"]:
        rows.append((f"answers in {script}", *(percent(one["scripts"][script]) for one in each)))
    return aligned(rows)


def histogram(lengths: Sequence[dict | None]) -> list[tuple[str, ...]]:
    """Rows of the shares of dialogues in each bin of lengths that any set has."""
    given = [one for one in lengths if one]
    if not given:
        return []
    width, rows = given[0]["width"], []
    for k in range(len(given[0]["counts"])):
        if any(one["counts"][k] for one in given):
            shares = (percent(one["counts"][k] / sum(one["counts"])) if one else "" for one in lengths)
            rows.append((f"  {k * width + 1:,} to {(k + 1) * width:,}", *shares))
    return rows


def filled(fill: dict | None) -> list[str]:
    """How full rows are."""
    if fill is None:
        return []
    head = ("", "row_length", "row_tiles", "tokens", "tiles", "dialogues a row", "rows", "steps an epoch")
    rows = [head]
    named = [("this run", fill["run"])] if fill["run"] else []
    for name, one in (*named, *(("packed", one) for one in fill["packed"])):
        cells = (number(one["row_length"]), number(one["row_tiles"]), percent(one["tokens"]))
        cells += (percent(one["tiles"]), f"{one['dialogues']:.1f}", number(one["rows"]), number(one["steps"]))
        rows.append((name, *cells))
    rows.append(("padded", "", "", percent(fill["padded"])))
    rows.append(("bucketed", "", "", percent(fill["bucketed"])))
    return aligned(rows)


def repeats(report: dict) -> list[str]:
    """A line for each number of times that dialogues or pictures occur; the most frequent few."""
    lines = []
    for what, found in report["all"]["repeated"].items():
        for n, m in found["times"][:5]:
            lines.append(f"{n:,} {what if n > 1 else what[:-1]} occur{'' if n > 1 else 's'} {m:,} times")
        if found["most"]:
            more = ", ..." if found["times"][0][1] > len(found["most"]) else ""
            lines.append(f"    most often: {', '.join(map(printable, found['most']))}{more}")
    return lines


def problems(report: dict) -> list[str]:
    """Each problem with its first examples, and whether there are any."""
    lines = []
    for one in report["problems"]:
        name = f"{printable(one['set'])}: " if len(report["sets"]) > 1 else ""
        lines.append(f"{one['count']:,} x {name}{one['reason']}")
        lines += [f"    {printable(example['message'])}" for example in one["examples"]]
    lines += [f"the check itself failed: {printable(failure)}" for failure in report["failed"]]
    if not report["complete"]:
        looked, records = report["all"]["records"], report["of"]
        lines.append(f"PARTIAL: {looked:,} of {records:,} records were looked at")
    elif report["problems"]:
        count = sum(one["count"] for one in report["problems"])
        lines.append(f"{count:,} of {report['of']:,} records have problems")
    else:
        lines.append(f"nothing wrong with {report['of']:,} records")
    return lines


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of cells in columns, the first to the left, the others to the right."""
    rows = [list(row) for row in rows]
    columns = max(map(len, rows))
    rows = [row + [""] * (columns - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *rest = widths
    return [
        GAP.join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], rest, strict=True))]).rstrip()
        for row in rows
    ]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def printable(text: str) -> str:
    """A text of the data on one line, without characters that would command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
