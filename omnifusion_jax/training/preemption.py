"""The notice that a machine of Google Cloud is about to be taken back, which then ends a run as SIGTERM does.

Schedulers (Kubernetes, Slurm) send SIGTERM themselves. A spot or preemptible VM, with TPUs or GPUs, sets
`instance/preempted` on its metadata server, and is switched off half a minute later.
https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
"""

import contextlib
import http.client
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path

PRODUCT = Path("/sys/class/dmi/id/product_name")  # says whose machine this is
HOST = "GCE_METADATA_HOST"  # the variable that Google's own libraries read
PATH = "computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=60&last_etag="
PAUSE = 5.0  # seconds before a server that did not answer is asked again


@contextlib.contextmanager
def watched():
    """A context in which the notice sends this process SIGTERM. On machines of others it does nothing."""
    ended = threading.Event()
    host = os.environ.get(HOST) or (on_google() and "metadata.google.internal")
    if host:
        threading.Thread(target=watch, args=(f"http://{host}/{PATH}", ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def on_google() -> bool:
    """Whether this is a machine of Google Cloud, from what its firmware says."""
    return PRODUCT.is_file() and PRODUCT.read_text(errors="replace").startswith("Google")


def watch(url: str, ended: threading.Event):
    """The thread's work: waits for the notice.

    The server answers when the value is no longer that of the last tag, or when a minute has passed.
    """
    tag = "0"
    while not ended.is_set():
        request = urllib.request.Request(url + tag, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=90) as answer:
                tag, preempted = answer.headers.get("ETag", "0"), answer.read().strip() == b"TRUE"
        except (OSError, http.client.HTTPException):  # the server is away for a while, or there is none
            time.sleep(PAUSE)
            continue
        if preempted and not ended.is_set():
            print("the machine is about to be taken back (preemption notice)", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            return
