"""The rows of a file of answers: which requests they answer, and how."""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path

from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.model import Answer
from omnifusion_jax.jobs.requests import Requests

START = b'{"id": '  # how every row begins
INPUT, DONE = ORDERS = ("input", "done")  # the orders in which rows may stand, as `answer_file` has them
ERROR = "error"  # the reason why an answer ends that is none
PLACE = "place"  # the field that says which request a row answers, where they stand as they were done


class Rows:
    """What is known of the rows of a file that is for the requests at `places`: 9 bytes of memory each."""

    def __init__(self, places: range):
        self.places = places
        self.answered = array("q")  # the place of each row's request
        self.failed = bytearray()  # whether a row is an error
        self.there = bytearray(len(places))  # whether the request at a place has a row

    def __len__(self):
        return len(self.failed)

    @property
    def errors(self) -> int:
        return sum(self.failed)

    @property
    def first(self) -> int | None:
        """The line, from 1 on, of the first error; None if there is none."""
        return self.failed.find(True) + 1 or None

    def add(self, place: int, failed: bool) -> None:
        self.answered.append(place)
        self.failed.append(failed)
        self.there[place - self.places.start] = True

    def has(self, place: int) -> bool:
        return bool(self.there[place - self.places.start])

    def left(self) -> Iterator[int]:
        """The places without a row."""
        return (place for place in self.places if not self.has(place))


def row(place: int, name: str, answer: Answer, order: str) -> tuple[bytes, bool]:
    """The row for the Answer to the request `name`, and whether it is an error."""
    told = {"id": name} | written(answer)
    if order == DONE:
        told[PLACE] = place
    line = json.dumps(told, ensure_ascii=False) + "\n"
    # a lone surrogate is escaped, as in JSON
    return line.encode(errors="backslashreplace"), answer.finish_reason == ERROR


def written(answer: Answer) -> dict:
    """What is written of an Answer; `others` and `likeliest` where they were asked for."""
    told = {field: getattr(answer, field) for field in ("text", "tokens", "finish_reason", "error")}
    if answer.likeliest:
        told["likeliest"] = answer.likeliest
    if answer.others:
        told["others"] = [written(other) for other in answer.others]
    return told


def read_rows(target: Path, requests: Requests, places: range, order: str) -> tuple[Rows, int]:
    """The complete rows of `target`, and how many bytes they take.

    Args:
      places: of the requests that the file is for.
      order: one of ORDERS.

    Raises:
      DataError: the file holds answers to other requests, or something other than answers.
    """
    rows, size, rest = Rows(places), 0, b""
    with open(target, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                rest = line
                break
            rows.add(*read_row(line, rows, target, requests, order))
            size += len(line)
    if not START.startswith(rest[: len(START)]):
        raise foreign(target)
    return rows, size


def read_row(line, rows, target, requests, order):
    """(place, whether it is an error) of the row that follows those in Rows. Raises DataError."""
    try:
        answer = json.loads(line)
        name, failed = answer["id"], answer["finish_reason"] == ERROR
        place = int(answer[PLACE]) if order == DONE else rows.places.start + len(rows)
    except (ValueError, TypeError, KeyError):
        raise foreign(target) from None
    if place not in rows.places:
        raise DataError(
            f"{target} holds more answers than there are requests: give another output, or remove it"
        )
    if rows.has(place):
        raise DataError(f"{target} answers {name} twice: give another output, or remove it")
    # A request that could not be read has its number for an id. It may have been corrected since.
    corrected = failed and name == requests.number(place)
    if not corrected and name != requests.name(place):
        raise DataError(
            f"{target} holds answers to other requests than {requests.source.where(place)}: "
            "give another output, or remove it"
        )
    return place, failed


def foreign(target):
    return DataError(f"{target} holds something else than answers: give another output")
