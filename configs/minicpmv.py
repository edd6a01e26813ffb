"""MiniCPM-V 2.0 learns from your dialogues, with the settings of its published script.

python -m omnifusion_jax.convert --source=openbmb/MiniCPM-V-2 --output=minicpm-v-2.0
python -m omnifusion_jax.train --config=configs/minicpmv.py --config.data.path=dialogues.json \\
    --config.data.images=images --workdir=runs/minicpmv

Everything is trained; `:frozen` leaves the vision tower as it is. `:lora` trains tower, resampler and
embeddings, and factors beside the four kernels of the decoder's attention, which are merged at the end.
docs/differences.md says what differs from the script, which is in the folder finetune of OpenBMB/MiniCPM-V.

Version 1.0, whose training is not published, is a preset:
--config.model.preset=minicpm-v-1.0 --config.init_from=minicpm-v-1.0
"""

from omnifusion_jax.config import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    OptimizerConfig,
    TrainConfig,
    variant,
)
from omnifusion_jax.models.presets import preset

ATTENTION = r"decoder/layers/attention/(query|key|value|out)"
LEARNED = rf"image/.*|decoder/embed|{ATTENTION}/lora_[ab]"
VARIANTS = {
    "": {"train_parts": ((r".*", 1.0),)},
    "frozen": {"train_parts": ((r"(image/adapter|decoder)/.*", 1.0), (r"image/encoders/.*", None))},
    "lora": {
        "train_parts": ((LEARNED, 1.0), (rf"(?!({LEARNED})$).*", None)),
        "lora": LoraConfig(rank=64, alpha=64.0, dropout=0.05, targets=rf"{ATTENTION}/kernel"),
    },
}


def get_config(name=""):
    return TrainConfig(
        model=preset("minicpm-v-2.0"),
        init_from="minicpm-v-2.0",
        steps=10_000,
        batch_size=8,  # one dialogue for each of 8 devices
        optimizer=OptimizerConfig(learning_rate=1e-6, weight_decay=0.1, warmup=0.01, beta2=0.95),
        remat="full",
        data=DataConfig(
            path="data/dialogues.json",
            images="data/images",
            num_workers=16,
            on_bad_sample="skip",
            on_long="cut",
            max_length=2048,
        ),
        checkpoint=CheckpointConfig(every_steps=1000, final="complete"),
        **variant(VARIANTS, name),
    )
