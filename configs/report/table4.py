"""Table 4 of the report: four encoders.

python -m omnifusion_jax.train --config=configs/report/table4.py:internvit-6b \\
    --config.data.path=captions.json --workdir=runs/internvit-6b
python -m omnifusion_jax.train --config=configs/report/table4.py:internvit-6b,sft \\
    --config.data.path=dialogues.json --workdir=runs/internvit-6b-sft

A decoder may stand between row and phase: internvit-6b,vicuna-7b,sft.
"""

from omnifusion_jax.config import variant
from omnifusion_jax.shipped.report import variants

VARIANTS = variants("clip-l", "bigg", "siglip-b", "internvit-6b")


def get_config(name="clip-l"):
    return variant(VARIANTS, name)()
