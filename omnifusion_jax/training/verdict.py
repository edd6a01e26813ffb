"""Judges from the log of a finished run whether it has learned anything."""

SHORT, BRIEF = 10, 100  # steps
MARGIN = 0.99  # a loss of at least this share of a model's that knows nothing counts as knowing nothing
VANISHED = 1e-5  # a gradient norm of at most this share of the first one moves nothing

LOOK = (
    "Look at train/loss and train/grad_norm in metrics.jsonl: "
    "is optimizer.learning_rate too high, is the data what it should be?"
)


def verdict(rows: list[dict], unknowing: float) -> list[str]:
    """What is wrong with the run as a whole: a list of sentences, empty for a run that learned.

    A run has failed when

    - no logged step had a finite loss;
    - the gradient norm was 0, or tiny beside that of the first step, throughout the second half, although the
      loss had not come down by half: activations are saturated, or nothing trained influences the targets;
    - the last loss is that of a model that knows nothing, or higher.

    A run that is too short for it is not judged by the last rule: one of fewer than 10 steps, or one of
    fewer than 100 whose loss has come down by a tenth since the first step. A small decoder may start above
    that loss on texts that it was not made for.

    Args:
      rows: the lines of metrics.jsonl as dicts, in order; the first is that of the first step.
      unknowing: the loss of a model that knows nothing: ln of the number of words it chooses from.
    """
    rows = [row for row in rows if "train/bad_steps" in row]  # the others are evaluations
    if not rows:
        return []
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    if not losses:
        return [f"No logged step had a finite loss, and nothing was learned. {LOOK}"]
    found, steps, first, last = [], rows[-1]["step"], losses[0], losses[-1]
    norms = [row.get("train/grad_norm", float("inf")) for row in rows]
    begun = next((norm for norm in norms if norm < float("inf")), 0.0)  # the first finite one
    late = max(norm for row, norm in zip(rows, norms, strict=True) if row["step"] > steps / 2)
    if late <= VANISHED * begun and last >= 0.5 * first:
        found.append(
            f"The gradient of all that is trained was {late:.2g} at most in the second half, "
            f"with a loss of {last:.4g}. {LOOK}"
        )
    short = steps < SHORT or (steps < BRIEF and last < 0.9 * first)
    if last >= MARGIN * unknowing and not short:
        found.append(
            f"The last loss, {last:.4g}, is no better than that of a model that knows nothing, "
            f"{unknowing:.4g}. {LOOK}"
        )
    return found
