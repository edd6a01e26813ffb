"""The run that `training/test_killed.py` kills: python -m killed WORKDIR STEPS"""

import sys
from pathlib import Path

import numpy as np
import tiny
from runs import batches, config, start

from omnifusion_jax.config import CheckpointConfig
from omnifusion_jax.training.evaluating import Evaluations
from omnifusion_jax.training.loop import train
from omnifusion_jax.training.workdir import locked

SAVES, EVALUATES = 4, 6  # every so many steps


def evaluate(arrays):
    """A figure that goes up and down, and says whether the parameters are the same to the bit."""
    return {"loss": float(np.sin(1e4 * np.asarray(arrays["decoder/head"]).astype(np.float64).sum()))}, []


def main(workdir, steps):
    checkpoint = CheckpointConfig(every_steps=SAVES)
    c = config(steps=steps, batch_size=2, dropout=0.1, checkpoint=checkpoint)
    c.eval.every_steps, checkpoint.keep_best = EVALUATES, "loss"
    with locked(workdir):
        tokenizer = tiny.make_tokenizer(workdir.with_name("words"))
        train(c, workdir, batches(tokenizer, c), start(c), Evaluations(evaluate, c))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
