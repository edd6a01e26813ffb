"""python -m omnifusion_jax.compare --model=A --other=B|--weights=int8 --data=dialogues.json

Says how far apart two models are that read the same tokens: the divergence of their next tokens, how often
they answer alike, and the bytes that they take. Without --other it is the same model in other weights.
"""

from absl import flags

from omnifusion_jax.api import load
from omnifusion_jax.checkpoints.base import WEIGHTS as KEPT_AS
from omnifusion_jax.cli.command import run
from omnifusion_jax.cli.overrides import MeshFlags
from omnifusion_jax.config import check
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.evaluation.comparison import compare

MODEL = flags.DEFINE_string("model", "omnifusion-tiny", "Bundled name, directory or hub id.")
OTHER = flags.DEFINE_string("other", None, "The other model, likewise; the same, when not given.")
VISION = flags.DEFINE_string("vision", None, "Vision tower, where a model does not hold one.")
WEIGHTS = flags.DEFINE_enum("weights", None, KEPT_AS, "What kernels of the other's decoder are kept in.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["bfloat16", "float32"],
    "Of parameters and computation; float32 on CPUs, else bfloat16, when not given.",
)
DATA = flags.DEFINE_string("data", None, "Dialogues, as for data.path in training.", required=True)
IMAGES = flags.DEFINE_string("images", "", "Folder that image names are relative to.")
COUNT = flags.DEFINE_integer("count", 100, "Dialogues that are read; 0: all of a finite set.", lower_bound=0)
BATCH = flags.DEFINE_integer("batch_size", 16, "Questions answered together.", lower_bound=1)
TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "Limit of an answer.", lower_bound=1)
MESH = MeshFlags()


def main(_):
    check(
        OTHER.value or WEIGHTS.value,
        "give --other, another model, or --weights, what its kernels are kept in",
    )
    how = {"vision": VISION.value, "dtype": DTYPE.value, "mesh": MESH.value}
    one = load(MODEL.value, **how)
    other = load(OTHER.value or MODEL.value, weights=WEIGHTS.value, **how)
    source = open_source(DATA.value, IMAGES.value, one.config.image.encoders[0].side)
    limits = {"batch_size": BATCH.value, "max_new_tokens": TOKENS.value}
    found = compare(one, other, source, COUNT.value, **limits)
    print(f"{'tokens of answers':28} {found['positions']:,}")
    print(f"{'KL divergence, mean':28} {found['kl']:.2e} nats")
    print(f"{'KL divergence, 99th of 100':28} {found['kl_99']:.2e} nats")
    print(f"{'the same likeliest token':28} {found['top_1']:.2%}")
    print(f"{'the same answers, greedy':28} {found['answers']:.2%} of {found['questions']:,}")
    print(f"{'bytes':28} {found['bytes']:,} and {found['bytes_other']:,}")


if __name__ == "__main__":
    run(main, MESH)
