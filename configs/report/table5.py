"""Table 5 of the report: ways to mix CLIP-L/14-336 and DINOv2-L.

python -m omnifusion_jax.train --config=configs/report/table5.py:sum \\
    --config.data.path=captions.json --workdir=runs/sum
python -m omnifusion_jax.train --config=configs/report/table5.py:sum,sft \\
    --config.data.path=dialogues.json --workdir=runs/sum-sft

A decoder may stand between row and phase: sum,vicuna-7b,sft.
"""

from omnifusion_jax.config import variant
from omnifusion_jax.shipped.report import variants

VARIANTS = variants("clip-l", "concat", "sum", "attention")


def get_config(name="clip-l"):
    return variant(VARIANTS, name)()
