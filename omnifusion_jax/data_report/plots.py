"""Bars as a picture, drawn by matplotlib where it is installed (the extra `report`)."""

import base64
import io
from collections.abc import Mapping


def can_draw() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def bars(counts: Mapping[str, float], label: str) -> str:
    """A bar chart of {name: value} as the data URL of an SVG file, the same bytes every time.

    `label` says what the values are.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "omnifusion", "text.parse_math": False}):
        figure = Figure(figsize=(6, 0.6 + 0.24 * len(counts)), layout="constrained")
        axes = figure.subplots()
        axes.barh(list(counts), list(counts.values()), color="#2b62c4")
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
