"""Makes the bundled models from nothing, within an hour on two CPU cores (figures in docs/tiny.md).

    python examples/make_tiny.py WORKDIR

trains the tokenizer, the encoder, the decoder and both phases, and writes the results to
omnifusion_jax/assets/. Finished trainings are not repeated, so a run that was cut off can be continued.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import make_tokenizer

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders.vision_towers import write_encoder
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.omnifusion.export import arrays_of, export_original, part, write_decoder
from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.checkpoints.tokenizers import copy_tokenizer
from omnifusion_jax.data.tokenizer import Tokenizer


def train(variant, workdir, *overrides):
    """Trains a variant of configs/tiny.py, unless that is done, and returns the finished model."""
    if not (workdir / "summary.json").is_file():
        command = [
            sys.executable,
            "-m",
            "omnifusion_jax.train",
            f"--config=tiny:{variant}",
            f"--workdir={workdir}",
            *overrides,
        ]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
    return load_checkpoint(workdir / "model")


def fresh(name):
    """The emptied directory of a bundled model."""
    shutil.rmtree(locate(name), ignore_errors=True)
    locate(name).mkdir(parents=True)
    return locate(name)


def main(workdir):
    make_tokenizer.main(workdir / "tokenizer")
    found = train("encoder", workdir / "encoder")
    c = found.config.image.encoders[0]
    write_encoder(fresh("omnifusion-tiny-encoder"), c, arrays_of(found, "image/encoders/0", jnp.bfloat16))

    found = train("decoder", workdir / "decoder", f"--config.tokenizer={workdir / 'tokenizer'}")
    c, target = found.config.decoder, fresh("omnifusion-tiny-decoder")
    arrays = part(found, "decoder", language_models.table(c), jnp.bfloat16)
    write_decoder(target, c, arrays, Tokenizer(found.tokenizer).ends)
    copy_tokenizer(workdir / "tokenizer", target)

    train("pretrain", workdir / "pretrain")
    found = train("sft", workdir / "sft", f"--config.init_from={workdir / 'pretrain' / 'model'}")
    target = locate("omnifusion-tiny")
    shutil.rmtree(target, ignore_errors=True)
    export_original(found, target, jnp.bfloat16, pickles=False)
    shutil.rmtree(target / "clip")  # the encoder was frozen, so it still is omnifusion-tiny-encoder
    size = sum(f.stat().st_size for f in target.parent.rglob("*") if f.is_file())
    print(f"{size / 1e6:.1f} MB in {target.parent}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
