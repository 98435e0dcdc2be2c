"""Own a process tree: `guard.py --log FILE --pids FILE [--grace SECONDS] -- ARGV...` runs ARGV and outlives all of it.

vLLM starts an engine in processes of its own and leaves them behind when it is killed hard, with the memory of the
device in their hands. So every server is started through this program, which

- starts ARGV in a session of its own, its output appended to the log;
- is the child subreaper, so that whatever is orphaned below it becomes its child, detached sessions included;
- writes down pid and start time of all it owns, for the next run to reap should this process itself be killed;
- ends the tree when ARGV ends, when it reads a word on its standard input or that is at its end (whoever holds it wants
  this to stop, or died), or when it gets SIGTERM or SIGINT: SIGTERM to the group, a while of grace, SIGKILL to whatever
  is left.

Its exit code is ARGV's, 128 + N for death by signal N. Standard library only and nothing of ours, so that it starts
in a few ms as a script of an isolated interpreter. Without /proc (macOS) it knows the group and no more.
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
"""How old the list of owned processes may be: the first after a change, up to the second while nothing changes."""
ORPHAN_GRACE = 1.0
"""What is left when ARGV itself has ended has nobody to finish for."""
DEAD_HOLDER_GRACE = 3.0
"""Seconds of grace at most where the holder died: nobody waits for an orderly end, the next run needs the memory."""
STOP = b"stop"
"""What a holder writes that lives."""
KILL_SECONDS = 30.0
"""A process that SIGKILL does not end in this time hangs in the kernel; waiting longer helps nobody."""
PROC = Path("/proc")
HAS_PROC = (PROC / "self/stat").exists()


def main(arguments: list[str]) -> int:
    """Run ARGV to its end; see the module."""
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
    tree, told = Tree(child, Path(options.pids)), ""
    try:
        pause = SCAN_SECONDS
        tree.record()
        while tree.status is None and not (told := _told(wake_read, pause)):
            pause = SCAN_SECONDS if tree.record() else min(2 * pause, LONGEST_SCAN_SECONDS)
    except FileNotFoundError:
        told = "dead"  # before this one could say what it owns, and the next run has removed what was left
    tree.end(options.grace, wake_read, dead=told == "dead")
    with contextlib.suppress(FileNotFoundError):
        tree.record()
    if tree.status is None:
        return 128 + signal.SIGKILL
    code = os.waitstatus_to_exitcode(tree.status)
    return code if code >= 0 else 128 - code


class Tree:
    """ARGV and everything below it."""

    def __init__(self, leader: int, pids: Path) -> None:
        self.leader = leader
        self.pids = pids
        self.status: int | None = None
        """What waitpid gave for ARGV, once it has ended."""
        self._recorded: list[dict[str, int]] = []

    def alive(self) -> list[int]:
        """Collect what has ended; the pids below this process that have not."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.leader:
                    self.status = ended[1]
        if HAS_PROC:
            return descendants({os.getpid()})
        return [] if self.status is not None else [self.leader]

    def record(self) -> bool:
        """Write down what is owned, if that has changed; whether it has."""
        owned = [{"pid": pid, "start": start} for pid in self.alive() if (start := start_time(pid)) is not None]
        if owned == self._recorded:
            return False
        self._recorded = owned
        claim(self.pids, owned)
        return True

    def end(self, grace: float, wake: int, *, dead: bool) -> None:
        """Leave nothing: ask the group, then kill what is left until nothing is. The holder is `dead`, or may be."""
        self._signal(signal.SIGTERM)
        deadline, shorter = time.monotonic() + grace, time.monotonic() + DEAD_HOLDER_GRACE
        while self.alive():
            if self.status is not None:
                deadline = min(deadline, time.monotonic() + ORPHAN_GRACE)
            if time.monotonic() >= (min(deadline, shorter) if dead else deadline):
                break
            if dead:
                _wait(wake, 0.1)  # its end of the pipe has nothing more to say
            else:
                dead = _told(wake, 0.1) == "dead"
        give_up = time.monotonic() + KILL_SECONDS
        while self._signal(signal.SIGKILL) and time.monotonic() < give_up:
            _wait(wake, 0.02)

    def _signal(self, number: int) -> bool:
        """Signal the group while its leader lives; with SIGKILL, or without a leader, everything. False: none left."""
        left = self.alive()
        if self.status is None or not HAS_PROC:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.leader, number)
        if self.status is not None or number == signal.SIGKILL:
            _kill(left, number)
        return bool(left)


def claim(pids: Path, owned: Iterable[dict[str, int]] = ()) -> None:
    """Write down that this process answers for these. A runner does so for none until its guard has started."""
    guard = {"pid": os.getpid(), "start": start_time(os.getpid())}
    beside = pids.with_name(f".{pids.name}")
    beside.write_text(json.dumps({"machine": machine(), "guard": guard, "processes": [*owned]}))
    os.replace(beside, pids)


def reap(pids: Path) -> list[int]:
    """Kill what a killed guard has left behind; returns the pids.

    A process is ours only if its pid *and* its start time are those recorded, on the same boot of the same machine.
    Its descendants and the other members of its session are ours too. A guard that lives does its own work: nothing
    is done then.
    """
    if not abandoned(pids):
        return []
    ours = _ours(pids)
    killed: set[int] = set()
    give_up = time.monotonic() + KILL_SECONDS
    while left := set(descendants(ours, with_sessions=True)) - {os.getpid()}:
        _kill(left, signal.SIGKILL)
        killed |= left
        if time.monotonic() > give_up:
            break
        time.sleep(0.02)
    return sorted(killed)


def survivors(pids: Path) -> list[int]:
    """What `reap` would kill: the processes that are recorded, all below them and in their sessions."""
    return sorted(set(descendants(_ours(pids), with_sessions=True)) - {os.getpid()}) if HAS_PROC else []


def abandoned(pids: Path) -> bool:
    """Whether this file was written on this machine by a guard that is no more."""
    record = _load(pids)
    if record is None or record["machine"] != machine():
        return False
    guard = record["guard"]
    return bool(start_time(guard["pid"]) != guard["start"])


def machine() -> str:
    """This boot of this machine, in this pid namespace: where a pid means what it meant."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return os.uname().nodename


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none, or only its corpse."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def descendants(roots: set[int], *, with_sessions: bool = False) -> list[int]:
    """Living processes below `roots`; with_sessions: the roots too, and whoever shares a session with one of them."""
    parent: dict[int, int] = {}
    session: dict[int, int] = {}
    for name in os.listdir(PROC):
        fields = _stat(int(name)) if name.isdigit() else None
        if fields is not None and fields[0] not in ("Z", "X"):
            parent[int(name)], session[int(name)] = int(fields[1]), int(fields[3])
    found = set(roots) & set(parent)
    sessions = {session[pid] for pid in found} if with_sessions else set()
    while True:
        more = {pid for pid in parent if (parent[pid] in found or session[pid] in sessions) and pid not in found}
        if not more:
            return sorted(found if with_sessions else found - roots)
        found |= more


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; the name before it may hold blanks and brackets."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _kill(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _ours(pids: Path) -> set[int]:
    """Recorded processes that live: pid and start time are those of the record."""
    record = _load(pids)
    return {p["pid"] for p in record["processes"] if start_time(p["pid"]) == p["start"]} if record else set()


def _load(pids: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(pids.read_text())
        return record if {"machine", "guard", "processes"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="guard", description="Run a program and leave nothing of it behind.")
    parser.add_argument("--log", required=True, help="where the program's output is appended")
    parser.add_argument("--pids", required=True, help="where the owned processes are written down")
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
    process.returncode = 0  # `Tree.alive` collects it; Popen must not try, nor warn
    return process.pid


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _told(wake: int, seconds: float) -> str:
    """Wait a moment for news: `stop`, which the holder or a signal asks for, `dead`, if the holder is, or nothing."""
    readable, _, _ = select.select([0, wake], [], [], seconds)
    signals = os.read(wake, 512) if wake in readable else b""
    if any(number != signal.SIGCHLD for number in signals):
        return "stop"
    return ("stop" if os.read(0, 512) else "dead") if 0 in readable else ""


def _wait(wake: int, seconds: float) -> None:
    """Sleep until a child ends or the time is over."""
    if select.select([wake], [], [], seconds)[0]:
        os.read(wake, 512)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
