"""Feedback from a model in place of people, as RLAIF-V has it (arXiv 2405.17220): from questions to pairs.

    answers.jsonl    {"id", "images", "question", "answers": [...]}              drawn from the model
    verdicts.jsonl   {"id", "claims": [[[claim, question, yes], ...], ...]}      of each answer, by the judge
    pairs.jsonl      {"id", "images", "question", "chosen", "rejected"}          what training reads

Every line is written as soon as it is known, and what was cut off goes on. `feedback.json` says what made
them; a folder of anything else is refused.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from omnifusion_jax.config import GenerationConfig, check
from omnifusion_jax.data.dialogues import Request, located
from omnifusion_jax.data.features import unlike
from omnifusion_jax.data.sources.json_file import parsed
from omnifusion_jax.errors import DataError
from omnifusion_jax.feedback.claims import Claim
from omnifusion_jax.feedback.pairs import Rated, balanced, candidates

HALF = 0.5  # a claim is refused when yes is less likely than that


@dataclasses.dataclass
class Collection:
    """What is asked, of whom, and how; and the folder in which it is written.

    Args:
      source: JSONL of {"id", "images", "question"}; ids are made of line numbers where there are none.
      images: the folder to which names of pictures are relative.
      made_by: who answers, splits and judges, for JSON.
    Raises: DataError for a source that cannot be read; ConfigError for a folder that something else made.
    """

    source: Path
    images: Path
    folder: Path
    made_by: dict

    def __post_init__(self):
        self.questions = list(read_questions(self.source))
        made = json.loads(json.dumps({**self.made_by, "source": self.source.read_text(encoding="utf-8")}))
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "feedback.json"
        if file.is_file():
            differ = unlike(json.loads(file.read_text(encoding="utf-8")), made)
            check(
                not differ,
                f"{self.folder} was made otherwise: {'; '.join(differ)[:2000]}. Give another folder",
            )
        else:
            file.write_text(json.dumps(made, indent=2, ensure_ascii=False), encoding="utf-8")

    def pictures(self, question: dict) -> list:
        return [located(name, "images", self.images) for name in question["images"]]

    def answer(self, model, count: int, generation: GenerationConfig):
        """Draws `count` answers to each question; those of a question depend on its id and the seed alone."""
        for question, put in self.missing("answers.jsonl"):
            talk = [{"role": "user", "content": question["question"]}]
            requests = [Request(talk, self.pictures(question), f"{question['id']}/{k}") for k in range(count)]
            put({**question, "answers": [answer.text for answer in model.generate(requests, generation)]})

    def judge(self, judge, split: Callable[[str], list[Claim]]):
        """Has the claims of each answer judged."""
        answers = {line["id"]: line["answers"] for line in read_lines(self.folder / "answers.jsonl")}
        for question, put in self.missing("verdicts.jsonl"):
            found = []
            for answer in answers[question["id"]]:
                claims = split(answer)
                likely = (
                    judge.yes(self.pictures(question), [claim.question for claim in claims]) if claims else []
                )
                found.append([[*claim, yes] for claim, yes in zip(claims, likely, strict=True)])
            put({"id": question["id"], "claims": found})

    def pair(self, most: int) -> int:
        """Writes at most `most` pairs of each question, and returns their number.

        An answer without claims is in no pair: nobody knows how good it is.
        """
        verdicts = {line["id"]: line["claims"] for line in read_lines(self.folder / "verdicts.jsonl")}
        answered = list(read_lines(self.folder / "answers.jsonl"))
        each = []
        for line in answered:
            rated = zip(line["answers"], verdicts[line["id"]], strict=True)
            each.append(candidates(Rated(text, refused(claims)) for text, claims in rated if claims))
        count, file = 0, self.folder / "pairs.jsonl"
        with open(file.with_suffix(".new"), "w", encoding="utf-8") as out:
            for line, pairs in zip(answered, balanced(each, most), strict=True):
                for k, pair in enumerate(pairs):
                    record = {
                        "id": f"{line['id']}/{k}",
                        "images": line["images"],
                        "question": line["question"],
                    }
                    out.write(json.dumps(record | pair._asdict(), ensure_ascii=False) + "\n")
                    count += 1
        file.with_suffix(".new").rename(file)
        return count

    def missing(self, name: str) -> Iterator[tuple[dict, Callable[[dict], None]]]:
        """Yields the questions that have no line in a file yet, each with what writes its line."""
        file = self.folder / name
        done = list(read_lines(file)) if file.is_file() else []
        whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in done)
        file.write_text(whole, encoding="utf-8")  # without a last line that was cut off
        known = {line["id"] for line in done}
        with open(file, "a", encoding="utf-8") as out:

            def put(line):
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()

            for number, question in enumerate(self.questions, 1):
                if question["id"] not in known:
                    yield question, put
                    print(f"{name}: {number:,} of {len(self.questions):,} questions", flush=True)


def refused(claims: list) -> int:
    """How many claims the judge holds for false."""
    return sum(yes < HALF for *_, yes in claims)


def read_lines(file: Path) -> Iterator[dict]:
    """The lines of a file of this module; one that was cut off ends it."""
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        yield json.loads(line)


def read_questions(file: Path) -> Iterator[dict]:
    """{"id", "images", "question"} of each line. Raises DataError, which names the line."""
    if not file.is_file():
        raise DataError(f"{file} does not exist: it should hold one question a line")
    seen = set()
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        found = parsed(line, where)
        good = (
            isinstance(found, dict) and isinstance(found.get("question"), str) and found["question"].strip()
        )
        images = found.get("images", []) if good else None
        if not (isinstance(images, list) and all(isinstance(name, str) for name in images)):
            raise DataError(f'{where} is not {{"id", "images": [names], "question"}}', "form")
        name = str(found.get("id", number))
        if name in seen:
            raise DataError(f"{where}: a second question with the id {name!r}. Give each its own", "form")
        seen.add(name)
        yield {"id": name, "images": images, "question": found["question"]}
