"""The key-value store that all hosts share."""

import socket

import jax
from jax._src import distributed  # the store has no public name; nothing else of JAX's own is used anywhere

ROOM = "omnifusion_jax"


class Store:
    """Text by key, in JAX's coordination service, which runs in the first host's process.

    It is reached over the network without a device. Every method raises ConnectionError when it cannot be.
    """

    def __init__(self):
        self.client = distributed.global_state.client

    def put(self, key: str, value: str):
        """Keeps a value, in place of an earlier one."""
        self.ask(self.client.key_value_set, key, value, allow_overwrite=True)

    def get(self, key: str, seconds: float) -> str:
        """Waits for a value. Raises TimeoutError when it does not come."""
        return self.ask(self.client.blocking_key_value_get, key, round(1000 * seconds))

    def all(self, folder: str) -> dict[str, str]:
        """The values in a folder, by the last part of their keys."""
        found = self.ask(self.client.key_value_dir_get, f"{folder}/")
        return {key.rpartition("/")[2]: value for key, value in found}

    def remove(self, folder: str):
        """Forgets all values in a folder."""
        self.ask(self.client.key_value_delete, f"{folder}/")

    def reachable(self, seconds: float = 2.0) -> bool:
        """Whether somebody listens where the store is; asked without JAX, which may be about to abort."""
        host, _, port = distributed.global_state.coordinator_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), seconds).close()
        except OSError:
            return False
        return True

    def ask(self, method, key, *arguments, **options):
        try:
            return method(f"{ROOM}/{key}", *arguments, **options)
        except jax.errors.JaxRuntimeError as error:
            kind = TimeoutError if "DEADLINE_EXCEEDED" in str(error) else ConnectionError
            raise kind(str(error)) from error
