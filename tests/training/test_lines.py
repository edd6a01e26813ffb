"""Files of a run with a JSON object a line."""

from omnifusion_jax.training.bad_steps import BadSteps
from omnifusion_jax.training.lines import read_rows, write_rows


def test_what_looks_like_the_end_of_a_line_within_a_text_is_none(tmp_path):
    rows = [{"answer": "two\u2028lines\u0085and\x0bmore\n"}, {"step": 2}]
    write_rows(tmp_path / "samples.jsonl", rows)
    assert read_rows(tmp_path / "samples.jsonl") == rows
    with open(tmp_path / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "los')
    assert read_rows(tmp_path / "samples.jsonl") == rows
    assert read_rows(tmp_path / "none.jsonl") == []


def test_bad_steps_that_are_run_again_are_forgotten_and_others_are_not(tmp_path):
    rows = [{"step": step, "parameters": [], "rows": []} for step in (99, 100, 103)]
    write_rows(tmp_path / "bad_steps.jsonl", rows)
    BadSteps(tmp_path, most=3, begun=100, before=2)
    assert read_rows(tmp_path / "bad_steps.jsonl") == rows[:2]
