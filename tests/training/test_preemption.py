"""The notice that a machine is about to be taken back, from a metadata server like Google's."""

import http.server
import io
import threading
import time
import types

import pytest

from omnifusion_jax.training import preemption
from omnifusion_jax.training.signals import Stop, Stopped


@pytest.fixture
def server(monkeypatch):
    """A metadata server; `server.said` are its answers, of which the last is given again and again."""
    asked = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            said = served.said.pop(0) if len(served.said) > 1 else served.said[0]
            time.sleep(0.02 if said == b"FALSE" else 0)  # as it waits for a change
            if said == b"gone":
                return  # which closes the connection
            self.send_response(200 if said else 503)
            self.send_header("ETag", f"tag{len(asked)}")
            if said == b"cut":
                self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    served.asked, served.said = asked, [b"FALSE"]
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setenv(preemption.HOST, f"127.0.0.1:{served.server_port}")
    monkeypatch.setattr(preemption, "PAUSE", 0.01)
    yield served
    served.shutdown()
    served.server_close()


def test_the_notice_stops_a_run_as_sigterm_does(server, capfd):
    """Also after the server was away for a while."""
    server.said = [b"FALSE", b"", b"gone", b"cut", b"TRUE"]
    with pytest.raises(Stopped), Stop() as stop, preemption.watched(), stop.deferred():
        until = time.monotonic() + 10
        while time.monotonic() < until:
            time.sleep(0.01)
            stop.check()
    assert stop.asked.name == "SIGTERM" and stop.status == 0
    assert "preemption notice" in capfd.readouterr().out
    paths, flavours = zip(*server.asked, strict=True)
    assert set(flavours) == {"Google"} and all("instance/preempted?wait_for_change=true" in p for p in paths)
    assert [path.rpartition("=")[2] for path in paths] == ["0", "tag1", "tag1", "tag1", "tag1"]


def test_nothing_happens_while_there_is_none(server):
    with Stop() as stop, preemption.watched():
        until = time.monotonic() + 10
        while len(server.asked) < 3 and time.monotonic() < until:
            time.sleep(0.01)
    assert len(server.asked) >= 3 and stop.asked is None


def test_a_notice_that_comes_after_the_end_of_a_run_is_for_others(monkeypatch):
    """The server answers when nobody watches any more: what the process does now is not stopped."""
    ended, sent = threading.Event(), []

    class Answer(io.BytesIO):
        headers = types.MappingProxyType({"ETag": "tag"})

    def answer(*_, **__):
        ended.set()
        return Answer(b"TRUE")

    monkeypatch.setattr(preemption.urllib.request, "urlopen", answer)
    monkeypatch.setattr(preemption.os, "kill", lambda *signal: sent.append(signal))
    preemption.watch("http://metadata/", ended)
    assert not sent


@pytest.mark.parametrize(
    ("firmware", "google"), [("Google Compute Engine\n", True), ("HVM domU\n", False), (None, False)]
)
def test_whose_machine_it_is(tmp_path, monkeypatch, firmware, google):
    file = tmp_path / "product_name"
    if firmware:
        file.write_text(firmware)
    monkeypatch.setattr(preemption, "PRODUCT", file)
    assert preemption.on_google() == google
