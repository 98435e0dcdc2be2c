"""-m: one run for each value, one after the other or side by side, as Hydra's launcher has it.

Every job is a run of its own, with a run directory and overrides of its own. The sweep's directory holds a link to
each and what became of it, so `compare DIRECTORY` has the table. What jobs have in common runs once, because they
share the store; a sweep that was interrupted goes on by the same command.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from speculators import ui
from speculators.config import compose
from speculators.config.schema import RunOptions
from speculators.errors import RunError, StageError
from speculators.job import write_json
from speculators.runner.execution.lease import Lease, LeaseReader
from speculators.runner.executors.remote import DEVICES, seen_devices

LOOK = 0.5
"""Seconds between two looks of a job in another process at whether the sweep is still there."""
_HELD = "held"
_BUSY = threading.Event()
"""Set while this process has a job."""


def main(words: Sequence[str], run: Callable[..., None], directory: Callable[[Path, str], Path]) -> int:
    """Carry out a sweep; 0 if every job ended well, else the worst of their exit codes.

    `run` carries out one recipe; `directory` makes a fresh one below a directory, with a name that ends so.
    """
    below = next((w.removeprefix("run.dir=") for w in words if w.startswith("run.dir=")), RunOptions().dir)
    place = directory(Path(below).expanduser().resolve(), "sweep")
    lease = Lease(place / _HELD)
    try:
        compose.multirun(words, place, functools.partial(_job, place, run, os.getpid(), seen_devices({})))
    except RunError:
        raise
    except Exception as error:
        traceback.print_exc()
        _tell(place)
        hint = "the same command goes on from here"
        raise StageError(f"the launcher lost the sweep: {type(error).__name__}", hint) from error
    finally:
        lease.release()
        (place / _HELD).unlink(missing_ok=True)
    return _tell(place)


def _job(place: Path, run: Callable[..., None], sweeper: int, devices: dict[str, str], job: compose.SweepJob) -> None:
    """One job, in whatever process. An error is told at once, and the other jobs go on."""
    apart = os.getpid() != sweeper
    said: dict[str, Any] = {"job": job.number, "words": job.overrides, "status": "interrupted", "code": 130}
    ui.narrate("job", str(job.number), " ".join(job.overrides))

    def announce(directory: Path) -> None:
        said["run"] = directory.name
        (place / f"{job.number:03d}").symlink_to(os.path.relpath(directory, place))

    if os.environ.get("SUBMITIT_EXECUTOR") == "local":  # which hides every GPU from its jobs
        os.environ.pop(DEVICES, None)
        os.environ.update(devices)
    if apart:
        _end_with_the_sweep(place)
    _BUSY.set()
    try:
        run(job.config(), job.overrides, announce=announce, plain=apart)
        said |= {"status": "done", "code": 0}
    except RunError as failure:
        ui.error(failure)
        said |= {"status": "failed", "code": 1, "message": failure.message}
    except Exception as defect:
        traceback.print_exc()
        said |= {"status": "failed", "code": 2, "message": f"{type(defect).__name__}: {defect}"}
    finally:
        write_json(place / f"{job.number:03d}.json", said)
        _BUSY.clear()


def _tell(place: Path) -> int:
    """A line for each job, by what sets it apart; the worst exit code."""
    said = [json.loads(path.read_text()) for path in sorted(place.glob("[0-9]*.json"))]
    common = set.intersection(*({*job["words"]} for job in said)) if said else set()
    for job in said:
        own = " ".join(word for word in job["words"] if word not in common)
        ui.narrate(job["status"], f"job {job['job']}", f"{own}  {job.get('message') or job.get('run', '')}")
    ui.narrate("sweep", f"{sum(job['code'] == 0 for job in said)} of {len(said)} done", str(place))
    return max((job["code"] for job in said), default=0)


@functools.cache
def _end_with_the_sweep(place: Path) -> None:
    """End this process when the one that has started the sweep is no more, on whatever machine; its job in order.

    Also when it has no job any more: a launcher's pool would wait for work from nobody.
    """
    lease = LeaseReader(place / _HELD)

    def watch() -> None:
        while lease.holder_lives is not False:
            time.sleep(LOOK)
        os.kill(os.getpid(), signal.SIGTERM)
        while _BUSY.is_set():
            time.sleep(LOOK)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="sweep", daemon=True).start()
