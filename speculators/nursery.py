"""`python -m speculators.nursery`: workers at the price of a fork.

Starting an interpreter and importing what every worker needs takes longer than many a stage. This process has done
both, computes nothing, has one thread, and forks for each order that comes in by the socket that is its standard
input. What comes out is like a worker that was started by itself: a session, standard streams and an environment of
its own. It is forked twice, so that it is an orphan at once; the runner is the subreaper of its orphans, which makes
it the runner's own child. Nothing depends on this process once a worker runs.

An order: 8 bytes with the length of what follows and, beside them, the descriptors of the worker's standard input and
of its log; then JSON of its arguments and of its whole environment. The answer is 8 bytes with its process id, 0 if
the system refuses one more process.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from pathlib import Path

from speculators import worker

NUMBER_BYTES = 8


def main() -> int:
    """Serve until the runner closes the socket or dies. Returns in each worker too, with its exit code."""
    channel = socket.socket(fileno=0)
    gc.collect()
    gc.freeze()  # a collection in a worker would otherwise touch, and so copy, every page
    while True:
        head, descriptors, _, _ = socket.recv_fds(channel, NUMBER_BYTES, 2)
        if not head:
            return 0
        order = json.loads(_received(channel, int.from_bytes(head)))
        pid = _fork_twice()
        if pid == 0:
            channel.detach()
            _become(order["name"], order["env"], *descriptors)
            return worker.main(order["arguments"])
        for descriptor in descriptors:
            os.close(descriptor)
        channel.sendall(max(pid, 0).to_bytes(NUMBER_BYTES))


def _received(channel: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = channel.recv(size)
        if not part:
            sys.exit(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _fork_twice() -> int:
    """0 in the new process; elsewhere its id, when only the subreaper is its parent any more; -1 if there is none."""
    reading, writing = os.pipe()
    try:
        middle = os.fork()
    except OSError:
        middle = -1
    if middle == 0:
        try:
            pid = os.fork()
        except OSError:
            os._exit(1)
        if pid == 0:
            os.close(reading)
            os.close(writing)
            return 0
        os.write(writing, pid.to_bytes(NUMBER_BYTES))
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    if middle > 0:
        os.waitpid(middle, 0)
    return int.from_bytes(said) if said else -1


def _become(name: str, env: dict[str, str], lifeline: int, log: int) -> None:
    """Take over what a worker that was started by itself would have been given."""
    os.setsid()
    for number, descriptor in enumerate((lifeline, log, log)):
        os.dup2(descriptor, number)
    os.close(lifeline)
    os.close(log)
    os.environ.clear()
    os.environ.update(env)
    Path("/proc/self/comm").write_text(name[:15])  # `ps` and `top` say which stage it is


if __name__ == "__main__":
    sys.exit(main())
