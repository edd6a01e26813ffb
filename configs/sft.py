"""Phase 2: the adapter, the special vectors and the decoder learn to answer.

python -m omnifusion_jax.train --config=configs/sft.py --config.init_from=runs/pretrain/model \\
    --config.data.path=dialogues.json --workdir=runs/sft

The default has the settings of the paper (arXiv 2404.06212), `:original` those of the published code; each
starts from its own phase 1. The paper names AdamW, learning rates and batch sizes. It mentions no gradient
clipping, and the published code has none.

To start from a released model instead of phase 1, add
--config.init_from=CONVERTED --config.parts_from={}
"""

from omnifusion_jax.config import CheckpointConfig, DataConfig, OptimizerConfig, TrainConfig, variant
from omnifusion_jax.models.presets import preset

# One epoch of 945 thousand dialogues, 64 rows at a time: 8 for each of 8 devices, or 1 for each of 64
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
        # horizon: the published code counts the batches of all 8 devices
        "optimizer": OptimizerConfig(name="adafactor", learning_rate=1e-4, clip=None, horizon=8.0),
        "loss_mean_rows": 1,  # the micro-batch of one device
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
        data=DataConfig(
            path="data/sft.json", images="data/images", num_workers=16, on_bad_sample="skip", on_long="cut"
        ),
        checkpoint=CheckpointConfig(every_steps=500, final="complete"),
        **variant(VARIANTS, name),
    )
    if name == "original":
        config.model.layout, config.model.image.adapter.init = "original", "torch"
    return config
