"""python -m omnifusion_jax.collect_feedback --model=M --judge=M_OR_URL --input=questions.jsonl --output=DIR \
[--images=DIR] [--answers=10] [--generation.temperature=0.7]

A model answers questions about pictures several times, a judge says of each claim whether it is true, and
answers with fewer refused claims are paired with those with more: DIR/pairs.jsonl, which objective=preference
reads. Run it again with the trained model for the next round.
"""

from pathlib import Path

from absl import flags

from omnifusion_jax.api import load
from omnifusion_jax.cli.command import run
from omnifusion_jax.cli.overrides import GenerationFlags, MeshFlags
from omnifusion_jax.config import check
from omnifusion_jax.data.images import is_url
from omnifusion_jax.feedback.claims import by_model, sentences
from omnifusion_jax.feedback.collect import Collection
from omnifusion_jax.feedback.judges import Own, Remote

MODEL = flags.DEFINE_string("model", "omnifusion-tiny", "Who answers: bundled name, directory or hub id.")
JUDGE = flags.DEFINE_string(
    "judge",
    None,
    "Who judges: the same, or http://HOST/v1#MODEL of an OpenAI-compatible server.",
    required=True,
)
SPLITTER = flags.DEFINE_string("splitter", None, "Who finds the claims: as --judge; none: --claim is asked.")
CLAIM = flags.DEFINE_string(
    "claim",
    "Is this true of the picture? {claim} Answer yes or no.",
    "Without --splitter: what is asked about each sentence of an answer, the {claim}.",
)
INPUT = flags.DEFINE_string("input", None, 'JSONL of {"id", "images", "question"}.', required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder; what is there already is kept.", required=True)
IMAGES = flags.DEFINE_string("images", "", "Folder that image names are relative to.")
ANSWERS = flags.DEFINE_integer("answers", 10, "Answers drawn to each question.", lower_bound=2)
PAIRS = flags.DEFINE_integer("pairs", 2, "Pairs of a question, at most.", lower_bound=1)
GENERATION, MESH = GenerationFlags(temperature=0.7), MeshFlags()


def named(source: str):
    """The judge that a flag names."""
    if not is_url(source):
        return Own(load(source, mesh=MESH.value))
    url, _, model = source.partition("#")
    check(bool(model), f"{source} names no model of the server: give {url}#MODEL")
    return Remote(url, model)


def main(_):
    check(GENERATION.value.temperature > 0, "answers must differ: set --generation.temperature above 0")
    check(SPLITTER.value or "{claim}" in CLAIM.value, "--claim has no {claim}, where the sentence stands")
    writer, judge = Own(load(MODEL.value, mesh=MESH.value)), named(JUDGE.value)
    splitter = named(SPLITTER.value) if SPLITTER.value else None
    split = by_model(splitter.ask) if splitter else sentences(CLAIM.value)
    made = {"model": writer.name, "judge": judge.name, "answers": ANSWERS.value}
    made |= {"splitter": splitter.name if splitter else CLAIM.value, "generation": vars(GENERATION.value)}
    found = Collection(Path(INPUT.value), Path(IMAGES.value), Path(OUTPUT.value), made)
    found.answer(writer.model, ANSWERS.value, GENERATION.value)
    found.judge(judge, split)
    print(
        f"{OUTPUT.value}/pairs.jsonl: {found.pair(PAIRS.value):,} pairs of {len(found.questions):,} questions"
    )


if __name__ == "__main__":
    run(main, GENERATION, MESH)
