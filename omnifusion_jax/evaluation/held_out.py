"""Looks at held-out data before a run begins, so that a wrong path or picture does not show hours later."""

from omnifusion_jax.config import EvalConfig
from omnifusion_jax.data.check import Report
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.sources import ENDLESS, Source
from omnifusion_jax.errors import DataError
from omnifusion_jax.evaluation.exact_match import questions
from omnifusion_jax.inference import prompts


def check_held_out(source: Source, c: EvalConfig, ask: Prepare, learn: Prepare):
    """Lays out all that an evaluation will read; of pictures it reads the headers alone.

    Of a source without an end it looks at the first dialogue only.

    Args:
      ask: prepares questions, with as much room as the model has.
      learn: prepares whole dialogues, whose loss is taken.
    Raises: DataError, which names what cannot be used, or says that there is no question.
    """
    ask, learn = ask.outlined(), learn.outlined()
    records = 1 if len(source) >= ENDLESS else len(source)
    report, asked = Report(records), 0
    for i in range(records):
        asks = c.answers and not 0 < c.count <= asked
        learns = c.loss and not 0 < c.count <= i
        if not (asks or learns):
            break
        problems = []
        try:
            dialogue = source[i]
            if learns:
                learn(dialogue)
            for request, *_ in questions(dialogue, ask.layout) if asks else ():
                prompts.question(request, dialogue.where, ask, c.max_new_tokens)
                asked += 1
        except DataError as error:
            problems.append((i, error))
        report.add(1, problems)
    if report.bad:
        raise DataError(f"held-out {report}\nSee to eval.path, eval.images, or what they name")
    if c.answers and not asked:
        raise DataError("the held-out data (eval.path) hold no question: an assistant's turn after a user's")
