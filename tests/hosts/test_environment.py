"""How hosts are recognised."""

import pytest

from omnifusion_jax.errors import ConfigError
from omnifusion_jax.hosts import environment
from omnifusion_jax.hosts.environment import arguments

SLURM = {
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_GPUS_ON_NODE": "8",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def found(environ, *given):
    return arguments(*(given or ("", None, None)), environ)


@pytest.fixture(autouse=True)
def no_chips(monkeypatch):
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: [])


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "4"},  # within salloc, not started by srun
        SLURM | {"SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        JAX | {"JAX_NUM_PROCESSES": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"},
    ],
)
def test_one_process_starts_nothing(environ):
    assert found(environ) is None


def test_flags_come_before_variables_and_these_before_schedulers():
    from_flags = found(JAX | SLURM, "b:2", 0, 3)
    assert from_flags["coordinator_address"] == "b:2" and from_flags["num_processes"] == 3
    from_variables = found(JAX | SLURM)
    assert from_variables["coordinator_address"] == "a:1" and from_variables["process_id"] == 1


def test_what_jax_finds_itself_is_left_to_it():
    assert found({"OMPI_COMM_WORLD_SIZE": "2"}) == {}
    assert found({"TPU_WORKER_HOSTNAMES": "a,b"}) == {}
    assert found({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == {}


def test_a_task_alone_on_its_node_gets_all_gpus_and_others_one_each():
    assert found(SLURM) == {"local_device_ids": list(range(8))}
    for tasks in ("8(x4)", "16", "16(x2)"):
        assert found(SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks}) == {}


@pytest.mark.parametrize(("said", "several"), [("a,b", True), ("a", False), ("", False)])
def test_a_tpu_vm_is_asked_of_its_slice(monkeypatch, said, several):
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.setattr(environment, "metadata", lambda url: said)
    assert (found({}) is not None) == several


@pytest.mark.parametrize(
    "given", [("a:1", None, 2), ("a:1", 0, None), ("", 0, 2), ("a", 0, 2), ("a:1", 2, 2)], ids=str
)
def test_a_part_of_what_is_needed_is_refused(given):
    with pytest.raises(ConfigError, match="--hosts=ADDRESS:PORT --host=NUMBER --of=COUNT"):
        found({}, *given)


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID is 'one'"):
        found(JAX | {"JAX_PROCESS_ID": "one"})
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS"):
        found({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
