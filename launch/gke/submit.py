#!/usr/bin/env python3
"""Starts a run in GKE, where the JobSet controller is installed: fills in tpu.yaml or gpu.yaml, and applies
it.

    launch/gke/submit.py tpu --name=sft --image=REGION-docker.pkg.dev/PROJECT/REPO/omnifusion \\
        --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 --devices=4 -- --config=sft --workdir=gs://BUCKET/sft
    launch/gke/submit.py gpu --name=sft --image=... --accelerator=nvidia-h100-80gb --hosts=4 --devices=8 --
    ...

`--dry-run` prints what would be applied. Logs: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME
--prefix.
End: kubectl delete jobset NAME, on which every host saves its state.
"""

import argparse
import json
import re
import string
import subprocess
import sys
from pathlib import Path

STOPPED = "--term_status=75"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("tpu", "gpu"))
    parser.add_argument("--name", required=True, type=dns_name, help="of the JobSet")
    parser.add_argument(
        "--image", required=True, help="a container with this package installed for the device"
    )
    parser.add_argument("--accelerator", required=True, help="as the nodes are labelled")
    parser.add_argument("--topology", default="", help="tpu: of a slice, such as 4x4")
    parser.add_argument("--hosts", type=int, default=1, help="machines, of one slice")
    parser.add_argument("--devices", type=int, required=True, help="chips or GPUs of a machine")
    parser.add_argument("--slices", type=int, default=1, help="tpu: slices, joined by mesh.dcn_data")
    parser.add_argument("--restarts", type=int, default=20, help="how often the run may be started again")
    parser.add_argument("--dry-run", action="store_true", help="print the JobSet, and start nothing")
    parser.add_argument("arguments", nargs="+", metavar="-- TRAIN_FLAG")
    given = parser.parse_args()
    if (given.kind == "tpu") != bool(given.topology):
        parser.error("--topology is of TPUs, and needed there")
    if given.kind == "gpu" and given.slices != 1:
        parser.error("--slices is of TPUs")
    text = filled(given)
    if given.dry_run:
        print(text, end="")
        return 0
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode


def filled(given) -> str:
    """The JobSet as YAML; lists are written as JSON, which is YAML too."""
    template = string.Template((Path(__file__).parent / f"{given.kind}.yaml").read_text(encoding="utf-8"))
    values = vars(given) | {"arguments": json.dumps([STOPPED, *given.arguments])}
    return template.substitute(values)


def dns_name(name: str) -> str:
    """A name as Kubernetes takes it; pods add up to 21 letters, and may have 63."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise argparse.ArgumentTypeError(f"{name!r}: small letters, digits and -, at most 40")
    return name


if __name__ == "__main__":
    sys.exit(main())
