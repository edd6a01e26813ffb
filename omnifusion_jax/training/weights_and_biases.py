"""Figures for Weights & Biases (wandb.ai), whose package need not be installed."""

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from omnifusion_jax.config import TrainConfig, to_json
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.paths import remote


class WeightsAndBiases:
    """Sends what a Board writes to a project of Weights & Biases.

    A run that is resumed goes on as the same run there, by the name in WORKDIR/wandb_run. Steps that are done
    again are not sent again: they had the same figures.

    Raises: ConfigError when the package is not installed, or refuses to begin.
    """

    def __init__(self, config: TrainConfig, workdir: Path):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"wandb={config.wandb}: Weights & Biases is not installed ({error}). "
                "Install it (pip install wandb), or leave --config.wandb out"
            ) from error
        file = workdir / "wandb_run"
        if not file.exists():
            file.write_text(secrets.token_hex(8))
        try:
            self.run = wandb.init(
                project=config.wandb,
                id=file.read_text(),
                name=workdir.name,
                resume="allow",
                dir=None if remote(workdir) else workdir,
                config=json.loads(to_json(config)),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"wandb={config.wandb}: {error}. Log in (wandb login), keep the figures here "
                "(WANDB_MODE=offline), or leave --config.wandb out"
            ) from error
        self.table = wandb.Table

    def add(self, step: int, figures: Mapping[str, float]):
        self.run.log(dict(figures), step=step)

    def show(self, step: int, records: Sequence):
        """Sends a table of questions, truths and answers."""
        rows = [[record.question, record.truth, record.answer] for record in records]
        self.run.log({"samples": self.table(["question", "truth", "answer"], rows)}, step=step)

    def close(self):
        self.run.finish()
