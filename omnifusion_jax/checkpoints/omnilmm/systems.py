"""The systems, and the conversion table of each.

omnilmm    EVA02-E, a resampler, Zephyr; pictures are squashed to one size
minicpmv   SigLIP, a resampler, MiniCPM; 1.0 squashes pictures, 2.0 cuts them into slices
"""

from typing import NamedTuple

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders.timm import TIMM_EVA02, TIMM_SIGLIP, Timm
from omnifusion_jax.checkpoints.mapping.transforms import MATRIX, SAME, Fused, split, split_in, split_out
from omnifusion_jax.config import ModelConfig

ADAPTER = "image/adapter/"
HEAD_DIM = 128  # of the resampler's attention


class System(NamedTuple):
    """What config.json calls a model_type."""

    architecture: str
    family: str  # of the language model
    tower: Timm
    tower_setting: str  # the setting that names the tower, as timm does
    tower_name: str  # the published one
    blocks: int  # how many of its blocks are run: all but the last
    queries_setting: str  # the setting that says how many queries the resampler has
    # what the names of tensors begin with
    language: str
    vision: str
    resampler: str
    tokens: tuple[str, ...]  # that stand around features; they are added in this order where they lack
    token: str  # that the template writes for the features of a picture
    labels: str
    templates: dict[str, str]  # by the fit of pictures: a row of published_templates.TEMPLATES


SYSTEMS = {
    "omnilmm": System(
        architecture="OmniLMMForCausalLM",
        family="mistral",
        tower=TIMM_EVA02,
        tower_setting="mm_vision_tower",
        tower_name="eva02_enormous_patch14_clip_224.laion2b_plus",
        blocks=63,
        queries_setting="num_query",
        language="",
        vision="model.vision_tower.",
        resampler="model.resampler.",
        tokens=("<im_patch>", "<im_start>", "<im_end>"),
        token="<im_patch>",
        labels="omnilmm",
        templates={"squash": "omnilmm"},
    ),
    "minicpmv": System(
        architecture="MiniCPMV",
        family="minicpm",
        tower=TIMM_SIGLIP,
        tower_setting="vision_encoder",
        tower_name="vit_so400m_patch14_siglip_384.webli",
        blocks=26,
        queries_setting="query_num",
        language="llm.",
        vision="vpm.",
        resampler="resampler.",
        tokens=("<image>", "</image>", "<slice>", "</slice>"),
        token="<unk>",
        labels="ends",
        templates={"squash": "minicpm-v", "slices": "minicpm-v"},
    ),
}


def resampler(c: ModelConfig) -> dict[str, tuple]:
    """The conversion table of the resampler, without its fixed positions."""
    width, heads = c.decoder.width, c.image.adapter.heads
    split_heads = (heads, width // heads)
    parts = [f"{ADAPTER}attention/{name}" for name in ("query", "key", "value")]
    rows = {
        "query": (ADAPTER + "queries", SAME),
        "attn.in_proj_weight": Fused(*((f"{part}/kernel", split_out(*split_heads)) for part in parts)),
        "attn.in_proj_bias": Fused(*((f"{part}/bias", split(*split_heads)) for part in parts)),
        "attn.out_proj.weight": (ADAPTER + "attention/out/kernel", split_in(*split_heads)),
        "attn.out_proj.bias": (ADAPTER + "attention/out/bias", SAME),
        "proj": (ADAPTER + "linear/kernel", SAME),  # multiplied from the right, unlike torch's linear maps
    }
    if c.image.encoders[0].width != width:
        rows["kv_proj.weight"] = (ADAPTER + "projection/kernel", MATRIX)
    for theirs, ours in (("ln_q", "query_norm"), ("ln_kv", "feature_norm"), ("ln_post", "norm")):
        rows |= {
            f"{theirs}.weight": (f"{ADAPTER}{ours}/scale", SAME),
            f"{theirs}.bias": (f"{ADAPTER}{ours}/bias", SAME),
        }
    return rows


def table(c: ModelConfig, system: System) -> dict[str, tuple]:
    """The conversion table of a whole checkpoint, but for the resampler's fixed positions."""
    parts = (
        (system.language, language_models.table(c.decoder)),
        (system.vision, system.tower.table(c.image.encoders[0])),
        (system.resampler, resampler(c)),
    )
    return {prefix + name: row for prefix, rows in parts for name, row in rows.items()}


def positions(system: System) -> str:
    """The name of the resampler's fixed positions."""
    return system.resampler + "pos_embed"
