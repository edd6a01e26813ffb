"""Phase 2: adapter, special vectors and decoder learn to answer.

python -m omnifusion_jax.train --config=configs/sft.py --config.init_from=runs/pretrain/model --config.data.path=dialogues.json --workdir=runs/sft

The default has the settings of the paper (arXiv 2404.06212), `:original` those of the published code, and each starts
from its own phase 1. The paper names AdamW, rates and batch sizes; it mentions no clipping of gradients, and the
published code has none.
Starting from a released model instead of phase 1:
--config.init_from=CONVERTED --config.parts_from={}
"""

from omnifusion_jax.config import CheckpointConfig, DataConfig, OptimizerConfig, TrainConfig, variant
from omnifusion_jax.models.presets import preset

# one epoch of 945 thousand dialogues; 64 rows at a time: 8 to a device on 8, one on 64
VARIANTS = {
    "": {
        "init_from": "runs/pretrain/model",
        "steps": 7400,
        "batch_size": 128,
        "grad_accum": 2,
        "optimizer": OptimizerConfig(name="adamw", learning_rate=2e-5, clip=None),
    },
    "original": {
        "init_from": "runs/pretrain-original/model",
        "steps": 1850,
        "batch_size": 512,
        "grad_accum": 8,
        "optimizer": OptimizerConfig(
            name="adafactor", learning_rate=1e-4, clip=None, horizon=8.0
        ),  # 8 devices
        "loss_mean_rows": 1,  # a device's micro-batch
    },
}


def get_config(name=""):
    config = TrainConfig(
        model=preset("omnifusion-1.1"),
        parts_from={
            "image/encoders/0": "openai/clip-vit-large-patch14-336",
            "decoder": "mistralai/Mistral-7B-v0.1",
        },
        train_parts=((r"(image/adapter|special|decoder)/.*", 1.0), (r"image/encoders/.*", None)),
        remat="full",
        data=DataConfig(path="data/sft.json", images="data/images", num_workers=16, on_bad_sample="skip"),
        checkpoint=CheckpointConfig(every_steps=500, final="complete"),
        **variant(VARIANTS, name),
    )
    if name == "original":
        config.model.layout, config.model.image.adapter.init = "original", "torch"
    return config
