"""A system small enough to train on two CPU cores, on pictures drawn on the fly.

encoder   a bare encoder learns to name what is where in a picture     (makes the bundled encoder)
decoder   a bare decoder learns to answer about pictures put into words (makes the bundled decoder)
pretrain  phase 1: adapter and special vectors learn captions, between the bundled encoder and decoder
sft       phase 2: the decoder is trained too, on questions and answers
real      phase 2 alone, with a fresh adapter and decoder, on a folder of real dialogues
"""

from omnifusion_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    variant,
)
from omnifusion_jax.models.presets import preset

ALL_BUT_ENCODER = ((r"(image/adapter|special|decoder)/.*", 1.0), (r"image/encoders/.*", None))


def tiny(**settings):
    # data=-1: the mesh takes all devices that there are, one as a rule and eight in tests
    return TrainConfig(
        model=preset("omnifusion-tiny"),
        compute_dtype="float32",
        mesh=MeshConfig(data=-1, fsdp=1),
        log_every=20,
        **settings,
    )


def encoder():
    return tiny(
        objective="patches",
        steps=1500,
        batch_size=128,
        train_parts=((r"image/encoders/.*|head", 1.0),),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.05, weight_decay=0.01),
        data=DataConfig(path="synthetic:patches"),
        eval=EvalConfig(count=1024),
    )


def decoder():
    return tiny(
        steps=4000,
        batch_size=64,
        tokenizer="omnifusion-tiny-decoder",
        train_parts=((r"(special|decoder)/.*", 1.0), (r"image/.*", None)),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.05, weight_decay=0.01),
        data=DataConfig(path="synthetic:text", max_length=96),
        eval=EvalConfig(path="synthetic:held-out-text", count=512, every_steps=1000),
    )


def pretrain():
    return tiny(
        steps=250,
        batch_size=64,
        parts_from={"image/encoders/0": "omnifusion-tiny-encoder", "decoder": "omnifusion-tiny-decoder"},
        train_parts=((r"(image/adapter|special)/.*", 1.0), (r"(image/encoders|decoder)/.*", None)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=0.05),
        data=DataConfig(path="synthetic:captions", max_length=96),
    )


def sft():
    return tiny(
        steps=1000,
        batch_size=64,
        parts_from={"image/encoders/0": "omnifusion-tiny-encoder", "decoder": "omnifusion-tiny-decoder"},
        init_from="runs/tiny/pretrain/model",
        train_parts=ALL_BUT_ENCODER,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.05),
        data=DataConfig(path="synthetic:questions", max_length=96),
        checkpoint=CheckpointConfig(final="complete"),
        eval=EvalConfig(path="synthetic:held-out", count=1000, blind=True),
    )


def real():
    """Needs the folder of real dialogues and the tokenizer of Mistral-7B beside the repository."""
    data = "../shared/data/"
    path, images = data + "real_dialogues/dialogues.json", data + "real_dialogues/images"
    config = tiny(
        steps=400,
        batch_size=12,
        parts_from={"image/encoders/0": "omnifusion-tiny-encoder"},
        tokenizer=data + "omnifusion_1_1",
        train_parts=ALL_BUT_ENCODER,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.05),
        data=DataConfig(path=path, images=images, max_length=224),
        checkpoint=CheckpointConfig(final="complete"),
        eval=EvalConfig(path=path, images=images, max_new_tokens=160),
    )
    config.model.decoder.vocab = 32000
    config.model.image.adapter.dropout = 0.0  # the dialogues are to be learned by heart
    return config


VARIANTS = {"real": real, "encoder": encoder, "decoder": decoder, "pretrain": pretrain, "sft": sft}


def get_config(name="pretrain"):
    return variant(VARIANTS, name)()
