"""Tiny LLaVA models as transformers builds, saves and runs them."""

import dataclasses
from pathlib import Path

import numpy as np
import tiny
import torch
import transformers as hf
from parity.torch_models import randomised
from PIL import Image

import omnifusion_jax as of
from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import clip
from omnifusion_jax.published_templates import TEMPLATES

C = tiny.config()
DECODERS = {
    "mistral": dataclasses.replace(
        C.decoder, vocab=328, max_length=1024
    ),  # more rows than tokens, as published checkpoints have them
    "llama": dataclasses.replace(
        C.decoder, vocab=328, max_length=1024, family="llama", window=None, heads=3, kv_heads=3
    ),
    "qwen2": dataclasses.replace(
        C.decoder, vocab=328, max_length=1024, family="qwen2", window=None, qkv_bias=True, tied=True
    ),
}
PICTURES = Path(__file__).parents[1].parent / "shared/data/real_dialogues/images"
QUESTIONS = (
    "What is in the picture?",
    "How many circles are there?",
    "Where is the blue square: left or right?",
    "A",
    "Why?\nSay it.",
)
TEXT = {"mistral": hf.MistralConfig, "llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config}
IMAGE = tiny.VOCAB  # the image token's id
SIDE = C.image.encoders[0].image_size
GRIDS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
KINDS = {  # model type: classes of the model, its config, the image processor, the processor
    "llava": (hf.LlavaForConditionalGeneration, hf.LlavaConfig, hf.CLIPImageProcessorPil, hf.LlavaProcessor),
    "llava_next": (
        hf.LlavaNextForConditionalGeneration,
        hf.LlavaNextConfig,
        hf.LlavaNextImageProcessorPil,
        hf.LlavaNextProcessor,
    ),
}
hf.utils.logging.disable_progress_bar()


def build(
    directory,
    kind="llava",
    decoder="mistral",
    template="llava-1.5",
    vision=None,
    pictures=None,
    pixels=None,
    **settings,
):
    """Saves a random model with its processor, and gives both.

    Args:
      vision: the config of another tower than CLIP.
      pictures: another class of image processor.
      pixels: settings of the image processor.
      settings: of the model's config.

    The head is sharp, so that choices are clear, and speaks up for the end of sequence.
    """
    model_class, config_class, picture_class, processor_class = KINDS[kind]
    settings |= {"image_grid_pinpoints": GRIDS} if kind == "llava_next" else {}
    config = config_class(
        vision_config=vision or hf.CLIPVisionConfig(**clip.CLIP.encoder_json(C.image.encoders[0], "float32")),
        text_config=TEXT[decoder](**language_models.decoder_json(DECODERS[decoder], "float32")),
        image_token_index=IMAGE,
        **settings,
    )
    config._attn_implementation = "eager"
    model = randomised(model_class(config), 5)
    with torch.no_grad():
        model.lm_head.weight *= 4
        model.lm_head.weight[2] *= 2
    model.save_pretrained(directory)
    more = {"image_grid_pinpoints": GRIDS} if kind == "llava_next" else {}
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    strategy = settings.get("vision_feature_select_strategy", "default")
    processor = processor_class(
        (pictures or picture_class)(**size | more | (pixels or {})),
        tokenizer(directory),
        patch_size=C.image.encoders[0].patch,
        num_additional_image_tokens=int(vision is None),
        vision_feature_select_strategy=strategy,
        chat_template=TEMPLATES[template],
    )
    processor.save_pretrained(directory)
    return model, processor


def tokenizer(directory):
    tiny.make_tokenizer(directory)
    made = hf.PreTrainedTokenizerFast.from_pretrained(
        directory, padding_side="left", pad_token="<unk>", add_bos_token=True
    )
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def messages(request):
    """A Request's messages as processors take them."""
    found = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in request.messages
    ]
    found[0]["content"][:0] = [{"type": "image"}] * len(request.images)
    return found


@torch.no_grad()
def generate(model, processor, requests, **settings):
    """Tokens generated for a batch of Requests, end of sequence included."""
    texts = [processor.apply_chat_template(messages(r), add_generation_prompt=True) for r in requests]
    images = [image for r in requests for image in r.images]
    inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
    eos = processor.tokenizer.eos_token_id
    out = model.generate(
        **inputs,
        **{"do_sample": False, "max_new_tokens": 24, "eos_token_id": eos, "pad_token_id": 0} | settings,
    )
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def pictures(*sizes, seed=0):
    """Pictures of (width, height) with large shapes in them: resizing them is no matter of noise."""
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize(size, Image.Resampling.NEAREST)
        for size in sizes
    ]


def shown():
    """A real picture where there are some, and drawn ones of several shapes."""
    real = [Image.open(file).convert("RGB") for file in sorted(PICTURES.glob("*.jpg"))[:2]]
    return [*real, *pictures((24, 24), (50, 31), (30, 64), (70, 20))]


def requests():
    """With and without a picture, of unequal lengths, one of several turns."""
    found = [
        of.Request([{"role": "user", "content": text}], images=[picture])
        for text, picture in zip(QUESTIONS * 2, shown(), strict=False)
    ]
    found += [of.Request([{"role": "user", "content": text}]) for text in QUESTIONS[:2]]
    turns = [("user", "What is it?"), ("assistant", "A red circle."), ("user", "Where?")]
    return [*found, of.Request([{"role": role, "content": text} for role, text in turns], images=shown()[:1])]


def agree(ours, model, processor, asked=None, beams=(1, 3), **settings):
    """Asserts that a Model generates the same tokens: all in one batch of theirs, greedily and by beams."""
    asked, lengths = asked or requests(), set()
    for n in beams:
        theirs = generate(model, processor, asked, num_beams=n, **settings)
        assert [
            a.tokens for a in ours.generate(asked, of.GenerationConfig(max_new_tokens=24, num_beams=n))
        ] == theirs
        lengths |= {len(tokens) for tokens in theirs}
    assert len(lengths) > 1
