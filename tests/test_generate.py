"""`generate` as a scheduler treats it: stopped in the middle, on two devices."""

import json
import os
import re
import signal
import subprocess
import sys
import time

from conftest import FAST_COMPILATION, ROOT

import omnifusion_jax as of


def test_a_stop_keeps_what_is_written_and_says_how_to_go_on(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [f"What is at the left of {i}?" for i in range(400)]
    source.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in texts)
    )
    drawn = {"max_new_tokens": 6, "temperature": 1.0, "seed": 5}
    arguments = [
        f"--input={source}",
        f"--output={target}",
        "--batch_size=2",
        "--dtype=float32",
        "--mesh.data=2",
    ]
    arguments += [f"--generation.{name}={value}" for name, value in drawn.items()]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {FAST_COMPILATION}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "omnifusion_jax.generate", *arguments]
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    until = time.monotonic() + 300
    while (
        run.poll() is None
        and time.monotonic() < until
        and not (target.exists() and target.read_bytes().count(b"\n") >= 8)
    ):
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[0]
    kept = f"stopped; {target} keeps the answers that are written; "
    lost = r"\d requests that were begun are asked again. The same command goes on from there\n"
    assert run.returncode == 0 and re.search(re.escape(kept) + lost + r"\Z", said), said
    rows = [json.loads(row) for row in target.read_text().split("\n")[:-1]]
    assert 8 <= len(rows) < 400
    asked = [
        of.Request([{"role": "user", "content": text}], id=str(n)) for n, text in enumerate(texts[:3], 1)
    ]
    alone = of.load("omnifusion-tiny", dtype="float32").generate(asked, of.GenerationConfig(**drawn))
    assert [row["tokens"] for row in rows[:3]] == [a.tokens for a in alone]  # on one device, in Python
