"""Alignment: from pairs of answers, one of them corrected or rated better, a model learns not to invent.

python -m omnifusion_jax.train --config=configs/dpo.py --config.init_from=runs/sft/model \\
    --config.data.path=data/rlaif_v --workdir=runs/dpo

The default is DPO with the settings of RLAIF-V (arXiv 2405.17220), `:lora` the same with factors beside the
decoder's kernels. `:dense` is dense DPO as the paper of RLHF-V has it (arXiv 2312.00849), `:released` as
its published script does; both are for corrected answers. Log-likelihoods of the reference, which is the
model that the run starts from, are computed first. One pair a row: batch_size counts pairs.

docs/alignment.md says more.
"""

from omnifusion_jax.config import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    OptimizerConfig,
    PreferenceConfig,
    TrainConfig,
    variant,
)
from omnifusion_jax.models.presets import preset

FACTORS = r"decoder/.*/lora_[ab]"
WHOLE = {"train_parts": ((r".*", 1.0),), "checkpoint": CheckpointConfig(every_steps=167, final="complete")}
OVER = {
    "lora": LoraConfig(rank=64, alpha=128.0),
    "train_parts": ((FACTORS, 1.0), (rf"(image|special)/.*|(?!{FACTORS})decoder/.*", None)),
    "checkpoint": CheckpointConfig(every_steps=167),
}
AI = {  # an iteration of RLAIF-V: 4 epochs
    "steps": 2672,
    "batch_size": 8,
    "preference": PreferenceConfig(beta=0.1),
    "data": "data/rlaif_v",
}
VARIANTS = {
    "": AI | WHOLE | {"optimizer": OptimizerConfig(learning_rate=5e-7, warmup=0.05, weight_decay=0.01)},
    "lora": AI | OVER | {"optimizer": OptimizerConfig(learning_rate=1e-5, warmup=0.05, weight_decay=0.01)},
    "dense": {
        "steps": 307,  # 7 epochs of 1.4 thousand pairs
        "batch_size": 32,
        "preference": PreferenceConfig(beta=0.5, changed_weight=5.0, average=True),
        "optimizer": OptimizerConfig(learning_rate=5e-7, warmup=0.1),
        "data": "data/rlhf_v",
        **WHOLE,
    },
    "released": {
        "steps": 2160,
        "batch_size": 8,
        "preference": PreferenceConfig(beta=0.1, changed_weight=1.1),
        "optimizer": OptimizerConfig(learning_rate=5e-7, warmup=0.03),
        "data": "data/rlhf_v",
        **WHOLE,
    },
}


def get_config(name=""):
    settings = dict(variant(VARIANTS, name))
    path = settings.pop("data")
    config = TrainConfig(
        model=preset("omnifusion-1.1"),
        objective="preference",
        init_from="runs/sft/model",
        remat="full",
        data=DataConfig(
            path=path,
            num_workers=16,
            on_bad_sample="skip",
            max_length=1024,
            packing=True,
            row_length=2048,
            window=1,  # one pair a row
        ),
        **settings,
    )
    config.model.image.adapter.dropout = 0.0  # the reference has none either
    return config
