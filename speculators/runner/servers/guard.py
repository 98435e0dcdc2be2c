"""Runs a program and ends its whole process tree: `guard.py --log FILE --pids FILE [--grace SECONDS] -- ARGV...`.

vLLM starts its engine in further processes, which survive when it is killed with SIGKILL and keep the memory of the
GPU. So every server is started through this program, which

- starts ARGV in a new session, with its output appended to the log;
- is the child subreaper: orphaned descendants become its children, in detached sessions too;
- records pid and start time of all descendants, so that the next run can reap them if this process is killed;
- ends the tree when ARGV exits, when the holder writes to its standard input or closes it (the holder requests a stop,
  or died), or on SIGTERM or SIGINT: SIGTERM to the process group, a grace period, SIGKILL to the rest.

Its exit code is ARGV's, 128 + N for death by signal N. It runs as a script of an isolated interpreter, which starts in
a few ms, so it imports the standard library only. Without /proc (macOS) it only knows the process group.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SCAN_SECONDS, LONGEST_SCAN_SECONDS = 0.25, 2.0
"""Seconds between two scans for descendants: the first after a change, up to the second while nothing changes."""
ORPHAN_GRACE = 1.0
"""Seconds of grace for descendants once ARGV has exited."""
DEAD_HOLDER_GRACE = 3.0
"""Most seconds of grace if the holder died: nobody waits for an orderly end, and the next run needs the memory."""
STOP = b"stop"
"""Bytes with which a live holder requests a stop."""
KILL_SECONDS = 30.0
"""Seconds to wait for SIGKILL to end a process: one that still exists then hangs in the kernel."""
PROC = Path("/proc")
HAS_PROC = (PROC / "self/stat").exists()


def main(arguments: list[str]) -> int:
    """Run ARGV until it exits or has to stop; return the exit code."""
    options = _parse(arguments)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    with open(options.log, "ab", buffering=0) as log:
        try:
            child = _start(options.argv, log)
        except OSError as error:
            log.write(f"cannot start {options.argv[0]}: {error.strerror}\n".encode())
            return 127
    tree, request = Tree(child, Path(options.pids)), ""
    try:
        pause = SCAN_SECONDS
        tree.record()
        while tree.status is None and not (request := _read_request(wake_read, pause)):
            pause = SCAN_SECONDS if tree.record() else min(2 * pause, LONGEST_SCAN_SECONDS)
    except FileNotFoundError:
        request = "dead"  # the holder died before this file was written, and the next run removed the directory
    tree.end(options.grace, wake_read, dead=request == "dead")
    with contextlib.suppress(FileNotFoundError):
        tree.record()
    if tree.status is None:
        return 128 + signal.SIGKILL
    code = os.waitstatus_to_exitcode(tree.status)
    return code if code >= 0 else 128 - code


class Tree:
    """ARGV and its descendants."""

    def __init__(self, leader: int, pids: Path) -> None:
        self.leader = leader
        self.pids = pids
        self.status: int | None = None
        """Status of ARGV from waitpid; None while it runs."""
        self._recorded: list[dict[str, int]] = []

    def alive(self) -> list[int]:
        """Wait for the processes that have ended; return the pids of the live descendants."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.leader:
                    self.status = ended[1]
        if HAS_PROC:
            return descendants({os.getpid()})
        return [] if self.status is not None else [self.leader]

    def record(self) -> bool:
        """Write the list of live descendants if it has changed; return whether it has."""
        owned = [{"pid": pid, "start": start} for pid in self.alive() if (start := start_time(pid)) is not None]
        if owned == self._recorded:
            return False
        self._recorded = owned
        claim(self.pids, owned)
        return True

    def end(self, grace: float, wake: int, *, dead: bool) -> None:
        """End the tree: SIGTERM and a grace period, shorter if the holder is or turns out `dead`, then SIGKILL."""
        self._signal(signal.SIGTERM)
        deadline, shorter = time.monotonic() + grace, time.monotonic() + DEAD_HOLDER_GRACE
        while self.alive():
            if self.status is not None:
                deadline = min(deadline, time.monotonic() + ORPHAN_GRACE)
            if time.monotonic() >= (min(deadline, shorter) if dead else deadline):
                break
            if dead:
                _wait(wake, 0.1)  # the pipe is at its end
            else:
                dead = _read_request(wake, 0.1) == "dead"
        give_up = time.monotonic() + KILL_SECONDS
        while self._signal(signal.SIGKILL) and time.monotonic() < give_up:
            _wait(wake, 0.02)

    def _signal(self, number: int) -> bool:
        """Signal the group while ARGV lives; with SIGKILL, or without ARGV, all descendants. False: none are left."""
        left = self.alive()
        if self.status is None or not HAS_PROC:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.leader, number)
        if self.status is not None or number == signal.SIGKILL:
            _kill(left, number)
        return bool(left)


def claim(pids: Path, owned: Iterable[dict[str, int]] = ()) -> None:
    """Record this process as the owner of these. The runner claims none, until its guard has started."""
    guard = {"pid": os.getpid(), "start": start_time(os.getpid())}
    temporary = pids.with_name(f".{pids.name}")
    temporary.write_text(json.dumps({"machine": machine(), "guard": guard, "processes": [*owned]}))
    os.replace(temporary, pids)


def reap(pids: Path) -> list[int]:
    """Kill the processes that a killed guard has left behind; return their pids.

    A process is killed only if its pid *and* start time are recorded, on the same boot of the same machine, or if it
    is a descendant or in the session of such a one. If the guard lives, nothing is done.
    """
    if not abandoned(pids):
        return []
    recorded = _live_recorded(pids)
    killed: set[int] = set()
    give_up = time.monotonic() + KILL_SECONDS
    while left := set(descendants(recorded, with_sessions=True)) - {os.getpid()}:
        _kill(left, signal.SIGKILL)
        killed |= left
        if time.monotonic() > give_up:
            break
        time.sleep(0.02)
    return sorted(killed)


def survivors(pids: Path) -> list[int]:
    """The pids that `reap` would kill: recorded processes, their descendants and the members of their sessions."""
    return sorted(set(descendants(_live_recorded(pids), with_sessions=True)) - {os.getpid()}) if HAS_PROC else []


def abandoned(pids: Path) -> bool:
    """Whether this file was written on this machine by a guard that has died."""
    record = _load(pids)
    if record is None or record["machine"] != machine():
        return False
    guard = record["guard"]
    return bool(start_time(guard["pid"]) != guard["start"])


def machine() -> str:
    """Identifies this boot of this machine and its pid namespace, within which recorded pids are valid."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return os.uname().nodename


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it does not exist or is a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def descendants(roots: set[int], *, with_sessions: bool = False) -> list[int]:
    """Live descendants of `roots`; `with_sessions`: also the roots, and all processes in their sessions."""
    parent: dict[int, int] = {}
    session: dict[int, int] = {}
    for name in os.listdir(PROC):
        fields = _stat(int(name)) if name.isdigit() else None
        if fields is not None and fields[0] not in ("Z", "X"):
            parent[int(name)], session[int(name)] = int(fields[1]), int(fields[3])
    selected = set(roots) & set(parent)
    sessions = {session[pid] for pid in selected} if with_sessions else set()
    while True:
        more = {pid for pid in parent if (parent[pid] in selected or session[pid] in sessions) and pid not in selected}
        if not more:
            return sorted(selected if with_sessions else selected - roots)
        selected |= more


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat after the name, which may contain blanks and brackets."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _kill(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _live_recorded(pids: Path) -> set[int]:
    """Recorded processes that still live: pid and start time match."""
    record = _load(pids)
    return {p["pid"] for p in record["processes"] if start_time(p["pid"]) == p["start"]} if record else set()


def _load(pids: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(pids.read_text())
        return record if {"machine", "guard", "processes"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="guard", description="Run a program and end its whole process tree.")
    parser.add_argument("--log", required=True, help="file to which the program's output is appended")
    parser.add_argument("--pids", required=True, help="file in which its processes are recorded")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("argv", nargs="+", help="the program, after `--`")
    return parser.parse_args(arguments)


def _start(argv: list[str], log: Any) -> int:
    guard = os.getpid()

    def die_with_the_guard() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != guard:
            os._exit(127)

    # The guard has one thread, so running Python between fork and exec is safe.
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=die_with_the_guard,
    )
    process.returncode = 0  # `Tree.alive` waits for it; Popen must neither wait nor warn
    return process.pid


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _read_request(wake: int, seconds: float) -> str:
    """Wait up to `seconds` for a request: `stop` from the holder or a signal, `dead` if the holder died; else empty."""
    readable, _, _ = select.select([0, wake], [], [], seconds)
    signals = os.read(wake, 512) if wake in readable else b""
    if any(number != signal.SIGCHLD for number in signals):
        return "stop"
    return ("stop" if os.read(0, 512) else "dead") if 0 in readable else ""


def _wait(wake: int, seconds: float) -> None:
    """Sleep for `seconds`, or until a signal arrives."""
    if select.select([wake], [], [], seconds)[0]:
        os.read(wake, 512)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
