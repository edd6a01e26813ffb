"""What the configs of the OmniFusion report's tables share (arXiv 2404.06212).

Every row of a table is trained in the report's two phases.
"""

import itertools
from functools import partial

from omnifusion_jax.models.presets import REPORTED, preset
from omnifusion_jax.shipped import pretrain, sft

ENCODERS = {  # hub ids of the encoders, by the name of the table's row
    "clip-l": "openai/clip-vit-large-patch14-336",
    "bigg": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "siglip-b": "google/siglip-base-patch16-512",
    "internvit-6b": "OpenGVLab/InternViT-6B-448px-V1-2",
}
SECOND = "facebook/dinov2-large"
DECODERS = {
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "vicuna-7b": "lmsys/vicuna-7b-v1.5",
    "vicuna-13b": "lmsys/vicuna-13b-v1.5",
}


def variants(*rows):
    """Functions that make the configs of a table, by the name ROW[,DECODER][,sft].

    Without a decoder the name means Mistral-7B, without sft the first phase. The second phase starts from
    runs/NAME/model, where NAME is the name of the first phase.
    """
    phases = {"": pretrain, "sft": sft}
    found = {}
    for row, decoder, phase in itertools.product(rows, DECODERS, phases):
        named = "" if decoder == REPORTED[0] else decoder
        name = ",".join(word for word in (row, named, phase) if word)
        found[name] = partial(experiment, row, decoder, phases[phase], name)
    return found


def experiment(row, decoder, phase, name):
    """The TrainConfig of a row with a decoder in one phase; `phase` is a config module, pretrain or sft."""
    config = phase.get_config()
    config.init_from = f"runs/{name.removesuffix(',sft')}/model" if phase is sft else None
    config.model = preset(f"report-{row}-{decoder}")
    towers = [ENCODERS.get(row, ENCODERS["clip-l"]), SECOND][: len(config.model.image.encoders)]
    config.parts_from = {f"image/encoders/{i}": tower for i, tower in enumerate(towers)}
    config.parts_from["decoder"] = DECODERS[decoder]
    config.data.max_length = 4096 if config.model.image.fit == "tiles" else 2048
    return config
