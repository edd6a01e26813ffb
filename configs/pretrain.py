"""Phase 1: the adapter and the four special vectors learn to caption pictures.

The CLIP encoder and the Mistral decoder around them are frozen.

python -m omnifusion_jax.train --config=configs/pretrain.py --config.data.path=captions.json \\
    --config.data.images=images --workdir=runs/pretrain
python -m omnifusion_jax.train --config=configs/pretrain.py:original \\
    --config.data.path=captions.json --config.data.images=images --workdir=runs/pretrain-original

The default has the settings of the paper (arXiv 2404.06212), `:original` those of the published code. The
paper names AdamW, learning rates and batch sizes. It mentions no gradient clipping, and the published code
has none.
"""

from omnifusion_jax.config import CheckpointConfig, DataConfig, OptimizerConfig, TrainConfig, variant
from omnifusion_jax.models.presets import preset

VARIANTS = {
    "": {"optimizer": OptimizerConfig(name="adamw", learning_rate=1e-3, clip=None)},
    "original": {
        # horizon: the published code counts the batches of all 8 devices
        "optimizer": OptimizerConfig(name="adafactor", learning_rate=1e-2, clip=None, horizon=8.0),
        "loss_mean_rows": 4,  # the micro-batch of one device
    },
}


def get_config(name=""):
    config = TrainConfig(
        steps=4900,  # one epoch of 1.25 million captions
        batch_size=256,
        grad_accum=4,  # 64 rows at a time: 8 for each of 8 devices, or 1 for each of 64
        model=preset("omnifusion-1.1"),
        parts_from={
            "image/encoders/0": "openai/clip-vit-large-patch14-336",
            "decoder": "mistralai/Mistral-7B-v0.1",
        },
        train_parts=((r"(image/adapter|special)/.*", 1.0), (r"(image/encoders|decoder)/.*", None)),
        remat="full",
        data=DataConfig(
            path="data/pretrain.json",
            images="data/images",
            num_workers=16,
            on_bad_sample="skip",
            on_long="cut",
        ),
        checkpoint=CheckpointConfig(every_steps=500),
        **variant(VARIANTS, name),
    )
    if name == "original":
        config.model.layout, config.model.image.adapter.init = "original", "torch"
    return config
