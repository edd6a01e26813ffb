"""How far apart two models are: divergences as PyTorch computes them, and the command."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
from conftest import run_command

import omnifusion_jax as of
from omnifusion_jax.data.sources import JsonSource
from omnifusion_jax.errors import ConfigError, DataError
from omnifusion_jax.evaluation.comparison import compare
from omnifusion_jax.inference.model import Model

TRUTHS = ("A red circle", "two circles to the left of it", "blue")


@pytest.fixture(scope="module")
def models(tokenizer):
    """A model, and one with another head for a few tokens."""
    c = tiny.looking("one encoder")
    arrays = tiny.arrays(c)
    head = arrays["decoder/head"].copy()
    head[:, 5:200] *= -0.5
    return [Model(c, a, tokenizer) for a in (arrays, arrays | {"decoder/head": head})]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    turns = lambda truth: [{"from": "human", "value": "What?"}, {"from": "gpt", "value": truth}]
    (folder / "d.json").write_text(json.dumps([{"conversations": turns(truth)} for truth in TRUTHS]))
    return JsonSource(folder / "d.json", folder)


def test_figures_are_those_of_pytorch(models, source, tokenizer):
    one, other = models
    found = compare(one, other, source, max_new_tokens=4)
    kl, same = [], []
    for truth in TRUTHS:
        talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": truth}]
        # the answer and its end stand last; each is predicted one position before
        n = len(tokenizer.encode(truth)) + 1
        p, q = (torch.from_numpy(m.logits(of.Request(talk))[0][-n - 1 : -1]).double() for m in models)
        logs = p.log_softmax(-1), q.log_softmax(-1)
        kl += torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found["positions"] == len(kl) and found["kl"] == pytest.approx(np.mean(kl), rel=1e-6)
    assert found["kl"] > 1e-3 and found["kl_99"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-6)
    assert found["top_1"] == np.mean(same) and 0 < found["top_1"] < 1
    asked = [of.Request([{"role": "user", "content": "What?"}])] * len(TRUTHS)
    said = [[a.tokens for a in m.generate(asked, of.GenerationConfig(max_new_tokens=4))] for m in models]
    assert found["answers"] == np.mean([a == b for a, b in zip(*said, strict=True)])
    assert found["questions"] == len(TRUTHS)
    assert found["bytes"] == found["bytes_other"] == 4 * sum(a.size for a in tiny.arrays(one.config).values())


def test_a_model_is_no_distance_from_itself(models, source):
    found = compare(models[0], models[0], source, 2, max_new_tokens=4)
    assert (found["kl"], found["top_1"], found["answers"], found["questions"]) == (0, 1, 1, 2)


def test_what_cannot_be_compared(models, source, tokenizer, tmp_path):
    c = tiny.looking("one encoder")
    c.layout = "text"
    arrays = {path: a for path, a in tiny.arrays(c).items()}
    with pytest.raises(ConfigError, match="other tokenizers or layouts"):
        compare(models[0], Model(c, arrays, tokenizer), source)
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(DataError):
        compare(*models, JsonSource(tmp_path / "d.json", tmp_path))


def test_the_command():
    arguments = ["--data=synthetic:held-out", "--count=3", "--max_new_tokens=8", "--dtype=float32"]
    said = run_command("compare", "--weights=int8", *arguments)
    figures = re.fullmatch(
        r"tokens of answers +(\d+)\n"
        r"KL divergence, mean +(\S+) nats\n"
        r"KL divergence, 99th of 100 +(\S+) nats\n"
        r"the same likeliest token +(\S+)%\n"
        r"the same answers, greedy +(\S+)% of (\d+)\n"
        r"bytes +([\d,]+) and ([\d,]+)\n",
        said,
    )
    assert figures, said
    assert 0 < float(figures[2]) < 0.01 and float(figures[5]) > 50 and int(figures[6]) == 3
    assert int(figures[8].replace(",", "")) < int(figures[7].replace(",", ""))
    assert "give --other, another model, or --weights" in run_command("compare", *arguments, fails=True)
    assert "/nowhere" in run_command("compare", "--other=/nowhere", *arguments, fails=True)
