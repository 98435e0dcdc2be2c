"""tally: lines -> lines. Writes one line after the other and never one twice; tells of a second writer."""

import fcntl
import http.client
import json
import os
import time
from pathlib import Path

LINES = 6


def main(job):
    world = Path(os.environ["CRASH_WORLD"])
    with (world / "bodies").open("a") as bodies:
        bodies.write(f"{job.node}\n")
    with (job.scratch / "writer").open("w") as writer:
        try:
            fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (world / "two-writers").write_text(job.node)
        before = "".join(
            sorted((path / "lines").read_text() for path in job.inputs.values() if (path / "lines").exists())
        )
        with (job.output / "lines").open("a") as lines:
            for number in range(len((job.output / "lines").read_text().splitlines()), LINES):
                for endpoint in job.services.values():
                    ask(endpoint)
                time.sleep(float(os.environ.get("CRASH_PACE", "0.005")))
                lines.write(f"{job.node} {number} {len(before)}\n")
                lines.flush()
                job.progress(LINES if number + 1 == LINES else number, LINES, "lines")


def ask(endpoint):
    from speculators.errors import ServiceError

    host = endpoint.url.removeprefix("http://")
    try:
        connection = http.client.HTTPConnection(host, timeout=10)
        body = json.dumps({"model": endpoint.model, "prompt": "1", "max_tokens": 1})
        connection.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {endpoint.api_key}"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
    except OSError as error:
        raise ServiceError(f"the server is gone: {error}", f"its log is {endpoint.log}") from None
    if answer.status != 200:
        raise ServiceError(f"the server answers {answer.status}", f"its log is {endpoint.log}")
