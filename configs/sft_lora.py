"""Phase 2 on one device of 24 GB: the adapter, the special vectors and low-rank factors of the decoder learn.

python -m omnifusion_jax.train --config=configs/sft_lora.py --config.init_from=runs/pretrain/model \\
    --config.data.path=dialogues.json --workdir=runs/sft-lora

The decoder's kernels are kept in 4 bits, in `:int8` in 8. Rank and learning rate are those of LLaVA-1.5's
recipe at half its rank (arXiv 2310.03744): 2e-4 for factors with alpha = 2 * rank, a tenth for the adapter.
`docs/training.md` says how the result is used.
"""

import dataclasses

from omnifusion_jax.config import CheckpointConfig, LoraConfig, OptimizerConfig, variant
from omnifusion_jax.shipped import sft

VARIANTS = {"": "int4", "int8": "int8"}
FACTORS = r"decoder/.*/lora_[ab]"


def get_config(name=""):
    return dataclasses.replace(
        sft.get_config(),
        batch_size=128,
        grad_accum=128,  # one row of 2048 tokens at a time
        lora=LoraConfig(rank=64, alpha=128.0, base=variant(VARIANTS, name)),
        train_parts=(
            (r"(image/adapter|special)/.*", 0.1),
            (FACTORS, 1.0),
            (rf"image/encoders/.*|(?!{FACTORS})decoder/.*", None),
        ),
        optimizer=OptimizerConfig(name="adamw", learning_rate=2e-4, clip=1.0),
        checkpoint=CheckpointConfig(every_steps=500),  # what is trained: adapter, vectors and factors
    )
