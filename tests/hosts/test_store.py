"""Where the store is, and whether somebody listens there."""

import socket
import types

import pytest

from omnifusion_jax.hosts import store


@pytest.fixture
def reachable(monkeypatch):
    """Whether a store at an address can be reached."""
    state = types.SimpleNamespace(client=None, coordinator_address=None)
    monkeypatch.setattr(store, "distributed", types.SimpleNamespace(global_state=state))

    def ask(address):
        state.coordinator_address = address
        return store.Store().reachable(0.5)

    return ask


def test_a_store_can_be_reached_while_somebody_listens(reachable):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert reachable(address)
    assert not reachable(address)


@pytest.mark.parametrize("address", ["10.0.0.7:1234", "[fd00::7]:1234", "host-0:1234"])
def test_an_address_of_each_kind_is_read(reachable, monkeypatch, address):
    asked = []
    connection = types.SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(socket, "create_connection", lambda *what: asked.append(what) or connection)
    host = address.removesuffix(":1234").strip("[]")
    assert reachable(address) and asked == [((host, 1234), 0.5)]
