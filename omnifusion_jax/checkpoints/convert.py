"""From one format to another."""

from omnifusion_jax.checkpoints.assemble import from_parts
from omnifusion_jax.checkpoints.checkpoint import Checkpoint, check_tokenizer
from omnifusion_jax.checkpoints.llava.export import export_llava
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.checkpoints.omnifusion.export import export_original
from omnifusion_jax.config import check, one_of

WRITERS = {
    "native": lambda checkpoint, output: save_native(
        output, checkpoint.config, checkpoint.arrays, checkpoint.tokenizer
    ),
    "omnifusion": export_original,
    "llava": export_llava,
}


def convert(source, output, to="native", *, decoder=None, **options) -> tuple[Checkpoint, tuple[str, ...]]:
    """Reads a checkpoint of any known format, or puts one together from parts, and writes it as `to`.

    Args:
      source: directory or hub id; None with `decoder` and the options `vision`, `vision2`, `preset`, `dtype`, which are the
        parts of a model and how they are joined (see `parts.from_parts`).
      output: new directory.
      to: "native", "omnifusion" or "llava".
      options: those of `load.load_checkpoint`: dtype, vision, vision2, assign, preset, format.
    Returns: the checkpoint, and the names of its parts that were initialised, since nothing had them.

    Raises:
      CheckpointError: the source cannot be read, or `to` has no place for it, or `output` exists.
      ConfigError: the options do not go together.
    """
    one_of("to", to, WRITERS)
    checkpoint, fresh = read(source, decoder, options)
    WRITERS[to](checkpoint, output)
    return checkpoint, fresh


def read(source, decoder, options):
    options = {name: value for name, value in options.items() if value is not None}
    check(
        bool(source) != bool(decoder),
        "give --source, a whole checkpoint, or --vision and --decoder, the parts of one",
    )
    if decoder:
        whole = {"assign", "format"} & set(options)
        check(
            "vision" in options and not whole,
            "--decoder needs --vision, and takes no --assign and no --format",
        )
        names = {"preset": "name"}
        return from_parts(decoder, **{names.get(name, name): value for name, value in options.items()})
    found = load_checkpoint(source, **options)
    if "decoder" in found.parts:
        check_tokenizer(found.tokenizer, found.config.decoder, source)
    return found, ()
