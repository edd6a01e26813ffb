"""Converts a checkpoint from one format to another."""

from pathlib import Path

from omnifusion_jax.checkpoints import integers
from omnifusion_jax.checkpoints.assemble import from_parts
from omnifusion_jax.checkpoints.base import kept_as
from omnifusion_jax.checkpoints.checkpoint import Checkpoint, check_tokenizer
from omnifusion_jax.checkpoints.llava.export import export_llava
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.mapping.shapes import NONE
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.checkpoints.omnifusion.export import export_original
from omnifusion_jax.checkpoints.omnilmm.export import export_omnilmm
from omnifusion_jax.checkpoints.omnilmm.folded import export_llama
from omnifusion_jax.config import check, one_of

WRITERS = {
    "native": lambda c, output: save_native(output, c.config, c.arrays, c.tokenizer, c.factors or NONE),
    "omnifusion": export_original,
    "llava": export_llava,
    "omnilmm": export_omnilmm,
    "llama": export_llama,
}


def convert(
    source: str | Path | None,
    output: str | Path,
    to: str = "native",
    *,
    decoder: str | Path | None = None,
    **options,
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Reads a checkpoint of any known format, or puts one together from parts, and writes it as `to`.

    Args:
      source: directory or hub id of a whole checkpoint. None if a model is put together from parts:
        from `decoder` and the options `vision`, `vision2`, `preset` and `dtype` (see `assemble.from_parts`)
        and `weights`.
      output: new directory.
      to: a row of WRITERS. "llama" writes the language model alone, its multipliers folded into it.
      decoder: directory or hub id of a language model; None with `source`.
      options: those of `load.load_checkpoint`: dtype, vision, vision2, assign, preset, format, base, weights.

    Returns: the checkpoint, and the names of its parts that were initialised because no source had them.

    Raises:
      CheckpointError: the source cannot be read, the format `to` cannot hold it, or `output` exists.
      ConfigError: the options contradict each other.
    """
    one_of("to", to, WRITERS)
    checkpoint, fresh = read(source, decoder, options)
    kind = integers.kind(checkpoint.arrays)
    check(
        kind is None or to == "native",
        f"kernels of the decoder are {kind}, and the format {to} holds values: --weights=plain writes those "
        "that the integers stand for",
    )
    WRITERS[to](checkpoint, output)
    return checkpoint, fresh


def read(source, decoder, options) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint at `source`, or the one put together from `decoder` and the other parts in `options`."""
    options = {name: value for name, value in options.items() if value is not None}
    check(
        bool(source) != bool(decoder),
        "give --source, a whole checkpoint, or --vision and --decoder, the parts of one",
    )
    if decoder:
        whole = {"assign", "format", "base"} & set(options)
        check(
            "vision" in options and not whole,
            "--decoder needs --vision, and takes no --assign, no --format and no --base",
        )
        if "preset" in options:
            options["name"] = options.pop("preset")  # what `from_parts` calls it
        weights = options.pop("weights", None)
        found, fresh = from_parts(decoder, **options)
        return kept_as(weights, found), fresh
    found = load_checkpoint(source, **options)
    if "decoder" in found.parts:
        check_tokenizer(found.tokenizer, found.config.decoder, source)
    return found, ()
