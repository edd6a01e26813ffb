"""Trains the tokenizer of the bundled models on dialogues about synthetic pictures.

It is a byte-pair encoding like that of Mistral.

python examples/make_tokenizer.py DIRECTORY
"""

import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from omnifusion_jax.config import ModelConfig
from omnifusion_jax.data.sources import SyntheticSource
from omnifusion_jax.data.synthetic import CELL_WORDS

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]  # characters that no other token covers are spelled in bytes
SPACE = "\u2581"  # what stands for a space in the vocabulary
SENTENCES, VOCABULARY = 20000, 1024


def corpus():
    """Yields the texts that the tokenizer is trained on."""
    source = SyntheticSource("text", 6)
    for i in range(SENTENCES):
        yield from (text for _, text in source[i].turns)
    yield from CELL_WORDS * 300  # each must become one token
    yield from [ModelConfig().prompt.strip()] * 300


def train():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    words = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    # digits and punctuation marks are separate tokens
    single = pre_tokenizers.Split(Regex(r"[0-9?!.,:;()\n-]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, single])
    spaces = decoders.Replace(SPACE, " ")
    steps = [spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(BYTES), special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def with_bytes(tokenizer):
    """The same tokenizer with the 256 byte tokens after the special ones, as in Mistral's vocabulary."""
    data = json.loads(tokenizer.to_str())
    learned = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)[len(SPECIAL) :]
    data["model"] |= {
        "vocab": {token: i for i, token in enumerate([*SPECIAL, *BYTES, *learned])},
        "byte_fallback": True,
        "fuse_unk": True,
    }
    return Tokenizer.from_str(json.dumps(data))


def main(directory):
    tokenizer = with_bytes(train())
    broken = [word for word in CELL_WORDS if len(tokenizer.encode(word).ids) != 1]
    assert not broken, f"not one token each: {broken}"
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{directory}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
