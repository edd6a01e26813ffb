"""The command plan, as a user types it."""

import importlib.util
import json
import re
import runpy

import pytest
from conftest import ROOT, run_command

# the bundled model, of fewer layers, on the devices that its config leaves open
LAYERS = ("--config.model.decoder.layers=1", "--config.model.image.encoders.0.layers=1")
TINY = ("--config=tiny:sft", *LAYERS)


@pytest.mark.parametrize("what", ["step", "decode"])
def test_an_estimate_for_gpus(tmp_path, what):
    said = run_command(
        "plan", *TINY, "--device=gpu:80GBx2", f"--what={what}", f"--json={tmp_path / 'plan.json'}"
    )
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["estimate"] and found["devices"] == 2 and found["what"] == what
    assert 0.7 < found["total"] / sum(found["bytes"].values()) < 1.3 and found["memory"] == 80e9
    assert "An estimate" in said and "fits" in said and found["bounds"] == {}
    if what == "step":
        assert found["rows"] == 64 and "gradients are summed over devices in f32 (100.00%)" in said
        moments = found["bytes"]["moments"]
        assert 0.5 < moments / found["bytes"]["parameters"] < 2.1  # twice what is trained, which is most


def test_what_does_not_fit_is_said_and_ends_with_1():
    said = run_command("plan", *TINY, "--device=gpu:0GB", "--what=decode", fails=True)
    assert "DOES NOT FIT" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --topology=v5e-16, or --device=gpu:80GB"),
        (["--topology=v5e-16", "--device=h100"], "give --topology=v5e-16, or --device=gpu:80GB"),
        (["--topology=v5e-17"], "there is no TPU slice 'v5e-17'; there are v5e-{1,4,8,16,32,64,128,256}"),
        (["--device=h100", "--search", "--what=decode"], "--search looks for a training step that fits"),
        (["--device=h100x3"], "64 examples at a time, which 3 devices"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(arguments, message):
    if "v5e-17" in str(arguments) and importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed")
    said = run_command("plan", *TINY, *arguments, fails=True)
    assert message in said and "Traceback" not in said


def test_the_page_of_plans_has_every_shipped_config_on_every_slice():
    """docs/plans.md; what its cells say is examples/plans.py's to compute."""
    made = runpy.run_path(str(ROOT / "examples" / "plans.py"))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "plans.md").read_text().splitlines()
        if line.startswith("|") and not line.startswith("|--")
    ]
    headers = [row for row in rows if row[0] == "config"]
    assert headers == [["config", *made["PLACES"]]] * 2
    assert {"v4-32", "v5e-16", "v5e-256", "v5p-16", "v5p-256", "v6e-16", "v6e-256"} == set(made["PLACES"])
    named = [row[0] for row in rows if row[0] != "config"]
    assert sorted(named) == sorted(made["configs"]()) and {"sft", "report/table5:sum,vicuna-13b"} <= set(
        named
    )
    cell = re.compile(r"-|\*\*no\*\*, \d+\.\d|\d+\.\d \([\d.e-]+ s\)")
    assert all(cell.fullmatch(text) for row in rows if row[0] != "config" for text in row[1:])
