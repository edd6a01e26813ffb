"""A store of Google's kind in memory: what tensorstore asks of it over HTTP, and what etils asks of fsspec.

Both see the same objects, so that a run finds what Orbax wrote, and Orbax what the run did.
"""

import json
import sys
import threading
import types
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """gs:// for fsspec, and with it for etils: objects by BUCKET/NAME."""

    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]  # of this class, as MemoryFileSystem has it
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("gs://", "memory://").replace("gcs://", "memory://"))

    def rename(self, path, other, recursive=False, **how):
        return self.mv(path, other, recursive=recursive)


class Server(BaseHTTPRequestHandler):
    """The part of the JSON API that tensorstore uses."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def answer(self, status, body=b"", kind="application/json", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def asked(self):
        """(path below the bucket's objects, query)."""
        found = urllib.parse.urlsplit(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(found.query).items()}
        bucket, _, name = found.path.partition("/b/")[2].partition("/o")
        return f"/{bucket}/", urllib.parse.unquote(name.removeprefix("/")), query

    def described(self, key):
        file = Bucket.store[key]
        made = str(file.created.timestamp()).replace(".", "")
        return {"name": key.split("/", 2)[2], "size": str(file.size), "generation": made}

    def do_GET(self):
        bucket, name, query = self.asked()
        if not name:
            prefix = bucket + query.get("prefix", "")
            items = [self.described(key) for key in sorted(Bucket.store) if key.startswith(prefix)]
            return self.answer(200, json.dumps({"items": items}).encode())
        file = Bucket.store.get(bucket + name)
        if file is None:
            return self.answer(404, b"{}")
        made = self.described(bucket + name)["generation"]
        if query.get("ifGenerationNotMatch") == made:
            return self.answer(304)
        if query.get("alt") != "media":
            return self.answer(200, json.dumps(self.described(bucket + name)).encode())
        body, headers = file.getvalue(), {"x-goog-generation": made}
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(body) - 1) + 1, len(body))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            return self.answer(206, body[start:stop], "application/octet-stream", **headers)
        return self.answer(200, body, "application/octet-stream", **headers)

    def do_POST(self):
        bucket, _, query = self.asked()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = bucket + query["name"]
        if query.get("ifGenerationMatch") == "0" and key in Bucket.store:
            return self.answer(412, b"{}")
        Bucket().pipe_file(key, body)
        return self.answer(200, json.dumps(self.described(key)).encode())

    def do_DELETE(self):
        bucket, name, _ = self.asked()
        known = Bucket.store.pop(bucket + name, None)
        return self.answer(404 if known is None else 204)


def opened(monkeypatch) -> ThreadingHTTPServer:
    """Starts the store; `shutdown()` ends it. gs:// is this one from then on."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    fsspec.register_implementation("gs", Bucket, clobber=True)
    Bucket.store.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    # Orbax asks google-cloud-storage of what kind a bucket is
    library = types.ModuleType("google.cloud.storage")
    library.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace(name=name))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    return server
