"""What the servers that tests play have in common: JSON in, JSON out, on a port of loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class JsonHandler(BaseHTTPRequestHandler):
    """A subclass says what it does with a request."""

    def do_GET(self) -> None:
        self.get()

    def do_POST(self) -> None:
        self.post(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def get(self) -> None:
        """Answer a question."""
        self.reply(404)

    def post(self, body: dict[str, Any]) -> None:
        """Answer what was posted."""
        raise NotImplementedError

    def reply(self, status: int, answer: Any = None) -> None:
        """Answer with JSON, or with nothing."""
        data = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def serving(handler: type[BaseHTTPRequestHandler], port: int = 0) -> ThreadingHTTPServer:
    """A server that answers until it is shut down; on a free port, if none is given."""
    http = ThreadingHTTPServer(("127.0.0.1", port), handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return http


def reporting(
    version: Any = "1.2.3", model: str = "target-x", root: str = "", status: int = 200
) -> ThreadingHTTPServer:
    """A server that reports of itself what vLLM does, is healthy, and refuses the key of whoever asks for more."""
    answers = {"/version": {"version": version}, "/v1/models": {"data": [{"id": model, "root": root or model}]}}

    class Handler(JsonHandler):
        def get(self) -> None:
            self.reply(status, answers.get(self.path))

        def post(self, body: dict[str, Any]) -> None:
            self.reply(401)

    return serving(Handler)


def hub_of(repo: str, commit: str, files: Mapping[str, bytes]) -> ThreadingHTTPServer:
    """A hub with one dataset, at one commit."""
    tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
    answers = {
        f"/api/datasets/{repo}/revision/{revision}": {"id": repo, "sha": commit} for revision in ("main", commit)
    }

    class Handler(JsonHandler):
        def get(self) -> None:
            path = unquote(urlsplit(self.path).path)
            prefix = f"/datasets/{repo}/resolve/{commit}/"
            if path.startswith(prefix) and (data := files.get(path.removeprefix(prefix))) is not None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("ETag", hashlib.sha256(data).hexdigest())
                self.send_header("X-Repo-Commit", commit)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)
            elif path == f"/api/datasets/{repo}/tree/{commit}":
                self.reply(200, tree)
            else:
                self.reply(200 if path in answers else 404, answers.get(path))

        def do_HEAD(self) -> None:
            self.get()

    return serving(Handler)
