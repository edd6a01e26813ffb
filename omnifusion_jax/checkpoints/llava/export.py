"""Writes a model as transformers' LLaVA classes load it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from omnifusion_jax.checkpoints.checkpoint import Checkpoint, check_whole
from omnifusion_jax.checkpoints.llava import processor, written_template
from omnifusion_jax.checkpoints.llava.settings import config_json
from omnifusion_jax.checkpoints.llava.tables import PROJECTOR, TOWERS, obstacles, table, tower_of
from omnifusion_jax.checkpoints.mapping.tensors import to_foreign
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy, lazy
from omnifusion_jax.checkpoints.storage.settings import write_json
from omnifusion_jax.checkpoints.storage.staging import written_beside
from omnifusion_jax.checkpoints.storage.weights import write_weights
from omnifusion_jax.config import GenerationConfig, ModelConfig
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError

REFUSED = (  # (a test of the ModelConfig, why transformers' class would compute something else if it holds)
    (lambda c: len(c.image.encoders) > 1, "there are two encoders, the class has one"),
    (
        lambda c: c.image.adapter.kind not in ("linear", "mlp"),
        "adapter.kind {0.image.adapter.kind!r} has no place between tower and projector",
    ),
    (
        lambda c: c.layout != "template" and c.image_place == "mark",
        "model.image_place=mark: the chat template of layout {0.layout} has pictures before the first turn",
    ),
    (
        lambda c: c.image.adapter.kind == "mlp" and c.image.adapter.mlp != c.decoder.width,
        "adapter.mlp is {0.image.adapter.mlp}, the class has the decoder's width {0.decoder.width}",
    ),
    (
        lambda c: c.image.encoders[0].resized,
        "encoder.position_grid {0.image.encoders[0].position_grid}: "
        "its positions are those of the picture's grid",
    ),
    (
        lambda c: c.image.encoders[0].feature_norm,
        "encoder.feature_norm: its features are hidden states as they are",
    ),
    (
        lambda c: c.image.fit in ("squash", "tiles") and c.image.encoders[0].canonical().shortest_edge,
        "encoder.shortest_edge with image.fit={0.image.fit}",
    ),
    (
        lambda c: c.image.fit == "tiles" and not (c.image.unpad and c.image.newline),
        "image.fit=tiles is exact with image.unpad and image.newline only",
    ),
)


def export_llava(checkpoint: Checkpoint, output: str | Path, dtype=None):
    """Writes a new directory that transformers' LLaVA classes load.

    It holds the weights, config.json, the tokenizer, the chat template and the processor's files.
    The layout's trained vectors become tokens with rows of their own in the embeddings. docs/conversion.md
    says what becomes of the head.

    Args:
      checkpoint: a whole model with a "linear" or "mlp" adapter on CLIP or SigLIP.
      output: the new directory, which gets its name only once everything is written.
      dtype: "bfloat16", "float32" or a numpy type; None keeps the arrays' own.

    Raises:
      CheckpointError: transformers' class would compute something else (all reasons are listed), parts are
        missing, or `output` exists.
    """
    check_whole(checkpoint)
    c = checkpoint.config
    check_exact(c)
    arrays = {path: lazy(a).astype(dtype or a.dtype) for path, a in checkpoint.arrays.items()}
    with written_beside(output, sum(a.nbytes for a in arrays.values())) as partial:
        added, image = write_tokenizer(checkpoint.tokenizer, partial, c)
        written_template.check_template(c, checkpoint.tokenizer, partial)
        names = Tokenizer(partial)
        arrays, vocab = with_rows(arrays, c, added)
        decoder = dataclasses.replace(c.decoder, vocab=vocab, tied="decoder/head" not in arrays)
        c = dataclasses.replace(c, decoder=decoder)
        tensors = to_foreign(arrays, table(c, tower_of(c.image.encoders[0])))
        tensors = tensors | identity(c, arrays["image/adapter/linear/kernel"].dtype)
        template = written_template.source(c, names.names["eos_token"])
        (partial / processor.TEMPLATE).write_text(template, encoding="utf-8")
        write_json(partial / processor.PICTURES, processor.pictures_json(c))
        write_json(partial / processor.PROCESSOR, processor.processor_json(c))
        write_json(partial / "config.json", config_json(c, str(arrays["decoder/embed"].dtype), image, names))
        write_json(partial / "generation_config.json", generation_json(names, sorted(added.values())))
        write_weights(partial, tensors)


def check_exact(c: ModelConfig):
    """Raises CheckpointError with every reason why transformers' classes would compute something else."""
    reasons = [reason.format(c) for test, reason in REFUSED if test(c)]
    found = obstacles(dataclasses.replace(c.image.encoders[0], position_grid=None))
    if all(found):
        reasons += [
            f"as {family.architecture}, encoder.{why}" for family, why in zip(TOWERS, found, strict=True)
        ]
    if reasons:
        raise CheckpointError(f"no export to transformers' LLaVA: {'; '.join(reasons)}")


def write_tokenizer(source: Path, target: Path, c: ModelConfig) -> tuple[dict[str, int], int]:
    """Writes the tokenizer with a token for each trained vector of the layout and one for a picture.

    Its class is PreTrainedTokenizerFast, which takes tokenizer.json as it is; a model family's own class
    would rebuild what stands there. Returns ({token: id} of the new tokens, the id of the picture's token).

    Raises:
      CheckpointError: the tokenizer already has a token that is to stand for a vector.
    """
    ours, backend = Tokenizer(source), Backend.from_file(str(Path(source) / "tokenizer.json"))
    vectors = list(written_template.tokens(c).values())
    taken = [token for token in vectors if backend.token_to_id(token) is not None]
    if taken:
        raise CheckpointError(
            f"{source}: the tokenizer has {', '.join(taken)} already, which are to stand for trained vectors"
        )
    tokens = (*vectors, c.image.token)
    new = [token for token in tokens if backend.token_to_id(token) is None]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    bos, begins = ours.names["bos_token"], c.layout == "template" and ours.adds_bos
    if begins:
        first = {
            "single": f"{bos} $A",
            "pair": f"{bos} $A {bos} $B",
            "special_tokens": [(bos, backend.token_to_id(bos))],
        }
        backend.post_processor = processors.TemplateProcessing(**first)
    written = json.loads(backend.to_str())
    if not begins:
        written["post_processor"] = None
    write_json(target / "tokenizer.json", written)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **ours.names,
        "pad_token": ours.names["unk_token"],
        "padding_side": "left",
        # Without this setting transformers 4 would add token types, which these models do not take
        "model_input_names": ["input_ids", "attention_mask"],
        "add_bos_token": begins,
        "clean_up_tokenization_spaces": False,
        "model_max_length": c.decoder.max_length,
    }
    write_json(target / "tokenizer_config.json", settings)
    return {token: backend.token_to_id(token) for token in new}, backend.token_to_id(c.image.token)


def with_rows(arrays: dict[str, Lazy], c: ModelConfig, added: dict[str, int]) -> tuple[dict[str, Lazy], int]:
    """The arrays with the layout's trained vectors as rows of the embeddings; and the number of rows.

    A new column of the head is the mean of all others, so that its logit is the mean of all other logits.
    It therefore never exceeds the largest of them, and gets at most 1 / vocab of the probability (Jensen's
    inequality). A tied head that gets new columns becomes an array of its own.

    Raises:
      CheckpointError: the vectors and the embeddings are of different types.
    """
    embed, head = arrays["decoder/embed"], arrays.get("decoder/head")
    vocab = c.decoder.vocab
    rows = max(vocab, *(i + 1 for i in added.values()), 0)
    vectors = {added[token]: arrays[f"special/{name}"] for name, token in written_template.tokens(c).items()}
    others = {str(a.dtype) for a in vectors.values()} - {str(embed.dtype)}
    if others:
        raise CheckpointError(
            f"trained vectors are {', '.join(others)}, the embeddings they join {embed.dtype}; "
            "give one type (--dtype)"
        )

    def embeddings():
        table = np.concatenate([np.asarray(embed), np.zeros((rows - vocab, embed.shape[1]), embed.dtype)])
        for row, vector in vectors.items():
            table[row] = np.asarray(vector)
        return table

    def heads():
        table = np.asarray(embed).T if head is None else np.asarray(head)
        mean = table.mean(axis=1, keepdims=True, dtype=np.float32).astype(table.dtype)
        return np.concatenate([table, np.repeat(mean, rows - vocab, axis=1)], axis=1)

    moved = {path for path in arrays if path.split("/")[0] == "special"} - {"special/newline"}
    kept = {path: a for path, a in arrays.items() if path not in moved}
    if rows > vocab or vectors:
        width = embed.shape[1]
        head_dtype = embed.dtype if head is None else head.dtype
        kept["decoder/embed"] = Lazy((rows, width), embed.dtype, lambda spans: embeddings()[spans])
        kept["decoder/head"] = Lazy((width, rows), head_dtype, lambda spans: heads()[spans])
    return kept, rows


def identity(c: ModelConfig, dtype) -> dict[str, np.ndarray]:
    """The projector's second layer where the adapter has no such layer: an identity map."""
    if c.image.adapter.kind != "linear":
        return {}
    width = c.decoder.width
    return {
        f"{PROJECTOR}linear_2.weight": np.eye(width, dtype=dtype),
        f"{PROJECTOR}linear_2.bias": np.zeros(width, dtype),
    }


def generation_json(tokenizer: Tokenizer, suppressed: list[int]) -> dict:
    """generation_config.json: greedy, as ours is by default, and without the `suppressed` new tokens."""
    never = {"suppress_tokens": suppressed} if suppressed else {}
    ends = {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    return {"do_sample": False, "max_new_tokens": GenerationConfig().max_new_tokens, **ends, **never}
