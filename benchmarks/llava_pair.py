"""One LLaVA of random weights, answering as this package has it and as transformers has it.

The decoder has 8 layers of width 512 and 32,000 tokens: 44 million parameters are read for a token, 175 MB in
float32. A picture takes 256 positions. --tiny shrinks all of it.

python benchmarks/llava_pair.py ours|transformers DIRECTORY DTYPE   a side, for decode.py and batch_vqa.py
"""

import json
import math
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image
from sides import be

WORDS = {"shortest": 24, "longest": 24}  # of a question
RESERVED = ("<unk>", "<s>", "</s>", "<image>", "USER", ":", "ASSISTANT")
END, IMAGE, PATCH = RESERVED.index("</s>"), RESERVED.index("<image>"), 14
DECODER = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
    "sliding_window": None,
}
TOWER = {"image_size": 224, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY = (
    DECODER | {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96},
    TOWER | {"image_size": 56, "hidden_size": 64, "num_hidden_layers": 2},
)


def make(directory: Path, tiny: bool, seed: int = 0) -> None:
    """Saves the model with its processor.

    Its head is sharp, so that answers do not hang on rounding, and speaks up for the end of sequence, so that
    they differ in length.
    """
    import torch
    import transformers as hf

    from omnifusion_jax.published_templates import TEMPLATES

    decoder, tower = TINY if tiny else (DECODER, TOWER)
    torch.manual_seed(seed)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            **tower, patch_size=PATCH, intermediate_size=4 * tower["hidden_size"]
        ),
        text_config=hf.MistralConfig(**decoder),
        image_token_index=IMAGE,
    )
    model = hf.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight *= 10
        model.lm_head.weight[END] *= 2
    model.save_pretrained(directory)
    side = tower["image_size"]
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer(directory, decoder["vocab_size"]),
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATES["llava-1.5"],
    )
    processor.save_pretrained(directory)


def tokenizer(directory, vocab):
    """One of whole words: w7 w8 ..."""
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*RESERVED, *(f"w{i}" for i in range(len(RESERVED), vocab))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.add_special_tokens(list(RESERVED[:4]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    names = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return hf.PreTrainedTokenizerFast.from_pretrained(
        directory, padding_side="left", pad_token="<unk>", add_bos_token=True
    )


def questions(seed: int, count: int, vocab: int, shortest: int, longest: int):
    """[(picture, text)], other ones for each seed. Lengths in words spread evenly on a logarithmic scale."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((320, 240))
        words = round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))
        numbers = rng.integers(len(RESERVED), vocab, words)
        found.append((picture, " ".join(f"w{i}" for i in numbers)))
    return found


def ours(directory, dtype):
    """(what answers questions in batches, what else it can be asked)."""
    import jax
    import jax.numpy as jnp

    import omnifusion_jax as of
    from omnifusion_jax.inference.prompts import lay_out

    model = of.load(directory, dtype=dtype)

    def request(picture, text):
        return of.Request([{"role": "user", "content": text}], [picture])

    def answer(asked, batch_size, settings):
        requests = [request(*one) for one in asked]
        found = model.generate(requests, of.GenerationConfig(**settings), batch_size=batch_size)
        return [one.tokens for one in found]

    def facts():
        decoder = model.config.decoder
        sample = lay_out(request(*questions(0, 1, decoder.vocab, **WORDS)[0]), "question", model.prepare)
        weights = sum(a.nbytes for a in jax.tree.leaves(model.module.decoder))
        embedding = decoder.vocab * decoder.width * jnp.dtype(dtype).itemsize  # of which a row is read
        return {
            "device": jax.devices()[0].device_kind,
            "prompt": len(sample.tokens),
            "weights": weights - embedding,
            "position": decoder.layers * 2 * decoder.kv_heads * decoder.head_dim * jnp.dtype(dtype).itemsize,
        }

    copy, multiply = jax.jit(lambda a: a + 1), jax.jit(lambda a, x: a @ x)

    def bandwidth(size):
        matrix = jnp.ones((size, size), dtype)
        return {
            "copy": 2 * matrix.nbytes / seconds(copy, matrix),
            "matrix and vector": matrix.nbytes / seconds(multiply, matrix, matrix[0]),
        }

    return answer, {"facts": facts, "bandwidth": bandwidth}


def seconds(f, *arguments):
    """What a call of a function takes: the middle of ten."""
    import jax

    found = []
    for _ in range(11):
        before = time.perf_counter()
        jax.block_until_ready(f(*arguments))
        found.append(time.perf_counter() - before)
    return median(found[1:])


def theirs(directory, dtype):
    """The same of transformers."""
    import torch
    import transformers as hf

    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = hf.LlavaForConditionalGeneration.from_pretrained
    model = load(directory, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    processor = hf.LlavaProcessor.from_pretrained(directory)

    @torch.no_grad()
    def answer(asked, batch_size, settings):
        found = []
        for first in range(0, len(asked), batch_size):
            pictures, texts = zip(*asked[first : first + batch_size], strict=True)
            messages = [
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
                for text in texts
            ]
            prompts = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(text=prompts, images=list(pictures), padding=True, return_tensors="pt")
            inputs = inputs.to(device, dtype=model.dtype)
            out = model.generate(**inputs, do_sample=False, eos_token_id=END, pad_token_id=0, **settings)
            found += [until_end(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]
        return found

    return answer, {}


def until_end(row):
    return row[: row.index(END) + 1] if END in row else row


SIDES = {"ours": ours, "transformers": theirs}


def side(name, directory, dtype):
    """What a side can be asked."""
    vocab = json.loads(Path(directory, "config.json").read_text())["text_config"]["vocab_size"]
    answer, more = SIDES[name](directory, dtype)

    def generate(seed, count, batch_size, settings, words=WORDS):
        asked = questions(seed, count, vocab, **words)
        before = time.perf_counter()
        tokens = answer(asked, batch_size, settings)
        return {"seconds": time.perf_counter() - before, "tokens": tokens}

    return {"generate": generate, **more}


if __name__ == "__main__":
    be(lambda: side(*sys.argv[1:]))
