"""Table 6 of the report: high resolution.

Its third row, "grid split + ruDocVQA", is the second row trained on other data.

python -m omnifusion_jax.train --config=configs/report/table6.py:grid \\
    --config.data.path=captions.json --workdir=runs/grid
python -m omnifusion_jax.train --config=configs/report/table6.py:grid,sft \\
    --config.data.path=dialogues.json --workdir=runs/grid-sft

A decoder may stand between row and phase: grid,vicuna-7b,sft.
"""

from omnifusion_jax.config import variant
from omnifusion_jax.shipped.report import variants

VARIANTS = variants("internvit-6b", "grid")


def get_config(name="internvit-6b"):
    return variant(VARIANTS, name)()
