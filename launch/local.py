#!/usr/bin/env python3
"""Runs a command as several hosts of one run, each a process on this machine with simulated CPU devices.

    launch/local.py --processes=2 --devices=4 -- python -m omnifusion_jax.train --config=tiny
    --workdir=runs/two

Every line of output begins with the number of its process. When one of them fails, the others are given
`--grace` seconds to end by themselves (they say which host they miss), and are then ended. Ctrl-C and SIGTERM
reach all.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

KILLED_AFTER = 20  # seconds between asking a process to end and killing it


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="how many hosts")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each")
    parser.add_argument(
        "--grace", type=float, default=90.0, help="seconds that the others may take after a failure"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND")
    given = parser.parse_args()
    address = f"127.0.0.1:{free_port()}"
    settings = [variables(given, address, number) for number in range(given.processes)]
    if given.dry_run:
        for own in settings:
            print(shlex.join(["env", *(f"{name}={value}" for name, value in own.items()), *given.command]))
        return 0
    return run(given.command, settings, given.grace)


def variables(given, address, number) -> dict[str, str]:
    """What a process finds in its environment."""
    devices = f"--xla_force_host_platform_device_count={given.devices}"
    return {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(given.processes),
        "JAX_PROCESS_ID": str(number),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip(),
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(command, settings, grace) -> int:
    """Runs all processes to their end, and returns the exit status of the first that failed, or 0."""
    # in sessions of their own: Ctrl-C comes from here, once, and not from the terminal as well
    children = [
        subprocess.Popen(
            command,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        for own in settings
    ]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda sent, frame: tell(children, sent))
    readers = [threading.Thread(target=show, args=pair) for pair in enumerate(children)]
    for reader in readers:
        reader.start()
    status = first_failure(children)
    for patience, number in ((grace, signal.SIGTERM), (KILLED_AFTER, signal.SIGKILL)):
        wait(children, patience)
        tell(children, number)
    for reader in readers:
        reader.join()
    return status if status >= 0 else 128 - status  # as shells do for signals


def first_failure(children) -> int:
    """Waits until a process fails, and returns its exit status; 0 when all have ended well."""
    while True:
        running = [child for child in children if child.poll() is None]
        failed = next((child.returncode for child in children if child.returncode), 0)
        if failed or not running:
            return failed
        time.sleep(0.05)


def wait(children, seconds):
    """Waits until all have ended, but not longer than that."""
    until = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(0.05)


def tell(children, number):
    """Sends a signal to all that still run."""
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def show(number, child):
    for line in child.stdout:
        print(f"{number} | {line}", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
