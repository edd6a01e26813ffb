"""What benchmarks/decode.py says, of times that are known and of a model whose sizes transformers knows."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark by name; it finds its neighbours as where it is run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


class Timed:
    """A side whose prefill and steps take so many seconds, but longer in the first of the rounds."""

    def __init__(self, prefill, step):
        self.prefill, self.step = prefill, step

    def ask(self, what, **question):
        if what == "facts":
            return {"device": "cpu", "weights": 5e9, "prompt": 30, "position": 1e7}
        if what == "bandwidth":
            return {"copy": 8e9, "matrix and vector": 16e9}
        seconds = self.prefill + self.step * (question["settings"]["max_new_tokens"] - 1)
        late = 100 * (question["seed"] in (10, 1010))
        return {"seconds": seconds + late, "tokens": [[question["seed"]]] * question["count"]}


def test_figures_of_decoding(benchmark, capsys):
    """A step of two rows reads 5 GB of weights and twice 34 positions: 5.68 GB, 0.355 s at 16 GB/s."""
    sides = {"ours": Timed(0.6, 0.5), "transformers": Timed(1.2, 1.0)}
    benchmark("decode").show(sides, [2], 8, 3, tiny=True)
    _, _, ours, theirs, bound = capsys.readouterr().out.splitlines()
    assert ours.split() == ["2", "ours", "100", "0.600", "4.0", "71%", "11.4", "2.00", "100%"]
    assert theirs.split() == ["2", "transformers", "50", "1.200", "2.0", "36%", "5.7"]
    assert bound.strip() == "bound, GB/s: copy 8.0, matrix and vector 16.0"


def test_bytes_that_a_step_reads(benchmark, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pair = benchmark("llava_pair")
    pair.make(tmp_path, tiny=True)
    facts = pair.ours(tmp_path, "float32")[1]["facts"]()
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    text = theirs.model.language_model
    read = [*text.layers.parameters(), *text.norm.parameters(), *theirs.lm_head.parameters()]
    assert facts["weights"] == sum(p.nbytes for p in read)
    cache = text(torch.tensor([[1, 7, 8]])).past_key_values.layers  # of three positions
    assert 3 * facts["position"] == sum(one.keys.nbytes + one.values.nbytes for one in cache)
