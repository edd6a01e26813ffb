"""What the environment of a process says about the hosts that it is one of."""

import glob
import re
import urllib.error
import urllib.request
from collections.abc import Mapping

from omnifusion_jax.errors import ConfigError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TPU_WORKERS = (
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
)


def arguments(address: str, number: int | None, count: int | None, environ: Mapping[str, str]) -> dict | None:
    """The arguments of jax.distributed.initialize, which finds itself what is not among them.

    Returns: None when this process is the only one.
    Raises: ConfigError for a part of what is needed.
    """
    if address or number is not None or count is not None:
        return given(address, number, count, "--hosts=ADDRESS:PORT --host=NUMBER --of=COUNT")
    for several, found in WAYS:
        if several(environ):
            return found(environ)
    return None


def given(address, number, count, names):
    """Arguments that were written out."""
    if count == 1:
        return None
    if not address or ":" not in address or number is None or count is None or not 0 <= number < count:
        raise ConfigError(
            f"hosts are given by {names}: the address of the first, the number of this one from 0 on, and "
            f"how many there are. Here they are {address!r}, {number} and {count}"
        )
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


def number_of(environ, name):
    value = environ.get(name, "")
    if value and not value.isdecimal():
        raise ConfigError(f"{name} is {value!r}, not a number")
    return int(value) if value else None


def variables(environ):
    names = f"the variables {ADDRESS}, {NUMBER} and {COUNT}"
    return given(environ.get(ADDRESS, ""), number_of(environ, NUMBER), number_of(environ, COUNT), names)


def slurm(environ):
    """JAX gives each task one GPU. A task that is alone on its node is given all of them here."""
    alone = re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    gpus = number_of(environ, "SLURM_GPUS_ON_NODE")
    return {"local_device_ids": list(range(gpus))} if alone and gpus else {}


def detected(environ):
    """JAX finds everything itself."""
    return {}


def has_many(name):
    return lambda environ: (number_of(environ, name) or 1) > 1


def tpu_slice(environ) -> bool:
    """Whether this machine is one of several with chips of one TPU slice, or of several slices."""
    if environ.get("JAX_PLATFORMS", "tpu").partition(",")[0] not in ("tpu", ""):
        return False
    if (number_of(environ, "MEGASCALE_NUM_SLICES") or 1) > 1:
        return True
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if names is None and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        names = metadata(TPU_WORKERS)
    return "," in (names or "")


def metadata(url) -> str:
    """What Google's metadata server says; nothing where there is none."""
    asked = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return ""


# How several hosts are recognised, and what is told to jax.distributed.initialize; the first that fits
# counts. JobSets set the variables (launch/gke).
WAYS = (
    (lambda environ: COUNT in environ or NUMBER in environ, variables),
    (lambda environ: "SLURM_PROCID" in environ and has_many("SLURM_NTASKS")(environ), slurm),
    (has_many("OMPI_COMM_WORLD_SIZE"), detected),
    (tpu_slice, detected),
)


# Variables that say which of several processes this one is, and how many there are
PROCESSES = (
    (NUMBER, COUNT),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)


def one_of_several(
    number: int | None, count: int | None, environ: Mapping[str, str]
) -> tuple[int, int] | None:
    """(number, count) of processes that share work without talking to each other; None for a single one.

    Where they are not given, the environment says them.

    Raises: ConfigError for a part of what is needed, and on a TPU slice of several machines where it is not
      given.
    """
    if number is None and count is None:
        said = [names for names in PROCESSES if all(map(environ.get, names))]
        if not said and tpu_slice(environ):
            raise ConfigError(
                "this machine is one of several of a TPU slice, which would all do the same: give each "
                "--host=NUMBER, from 0, and --of=COUNT"
            )
        number, count = (number_of(environ, name) for name in said[0]) if said else (0, 1)
    if number is None or count is None or number >= count:
        raise ConfigError(
            "several hosts are given by --host=NUMBER, from 0, and --of=COUNT. "
            f"Here they are {number} and {count}"
        )
    return None if count == 1 else (number, count)
