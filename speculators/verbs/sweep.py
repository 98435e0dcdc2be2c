"""-m: one run for each combination of values, in sequence or in parallel, depending on Hydra's launcher.

Each job is a run with its own run directory and overrides. The sweep's directory has a link to each run and its status,
for `compare DIRECTORY`. Stages that jobs have in common run once, because jobs share the store. The same command
resumes an interrupted sweep.
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
from speculators.config.execution import RunOptions
from speculators.errors import RunError, StageError
from speculators.job import write_json
from speculators.runner.execution.lease import Lease, LeaseReader
from speculators.runner.executors.remote import seen_devices
from speculators.runner.hardware import VISIBLE
from speculators.timeouts import SWEEP_POLL_SECONDS

_LEASE = "held"
_BUSY = threading.Event()
"""Set while this process runs a job."""


def sweep(argv: Sequence[str], run: Callable[..., None], create: Callable[[Path, str], Path]) -> int:
    """Run a sweep; returns 0 if every job succeeded, else the largest of their exit codes.

    `run` runs one recipe; `create` creates a new directory in a parent, with a name that ends in its second argument.
    """
    parent = next((a.removeprefix("run.dir=") for a in argv if a.startswith("run.dir=")), RunOptions().dir)
    directory = create(Path(parent).expanduser().resolve(), "sweep")
    lease = Lease(directory / _LEASE)
    try:
        compose.multirun(argv, directory, functools.partial(_job, directory, run, os.getpid(), seen_devices({})))
    except RunError:
        raise
    except Exception as error:
        traceback.print_exc()
        _report(directory)
        hint = "run the same command again to resume the sweep"
        raise StageError(f"the launcher lost the sweep: {type(error).__name__}", hint) from error
    finally:
        lease.release()
        (directory / _LEASE).unlink(missing_ok=True)
    return _report(directory)


def _job(
    sweep_directory: Path, run: Callable[..., None], sweeper: int, devices: dict[str, str], job: compose.SweepJob
) -> None:
    """Run a job, in any process. An error is reported at once, and other jobs continue."""
    other_process = os.getpid() != sweeper
    result: dict[str, Any] = {"job": job.number, "words": job.overrides, "status": "interrupted", "code": 130}
    ui.narrate("job", str(job.number), " ".join(job.overrides))

    def announce(directory: Path) -> None:
        result["run"] = directory.name
        (sweep_directory / f"{job.number:03d}").symlink_to(os.path.relpath(directory, sweep_directory))

    if os.environ.get("SUBMITIT_EXECUTOR") == "local":  # submitit hides every GPU from its local jobs
        os.environ.pop(VISIBLE, None)
        os.environ.update(devices)
    if other_process:
        _end_with_the_sweep(sweep_directory)
    _BUSY.set()
    try:
        run(job.config(), job.overrides, announce=announce, lines_only=other_process)
        result |= {"status": "done", "code": 0}
    except RunError as failure:
        ui.error(failure)
        result |= {"status": "failed", "code": 1, "message": failure.message}
    except Exception as defect:
        traceback.print_exc()
        result |= {"status": "failed", "code": 2, "message": f"{type(defect).__name__}: {defect}"}
    finally:
        write_json(sweep_directory / f"{job.number:03d}.json", result)
        _BUSY.clear()


def _report(directory: Path) -> int:
    """Report each job by the overrides that distinguish it; returns the largest exit code."""
    jobs = [json.loads(path.read_text()) for path in sorted(directory.glob("[0-9]*.json"))]
    common = set.intersection(*({*job["words"]} for job in jobs)) if jobs else set()
    for job in jobs:
        overrides = " ".join(override for override in job["words"] if override not in common)
        ui.narrate(job["status"], f"job {job['job']}", f"{overrides}  {job.get('message') or job.get('run', '')}")
    ui.narrate("sweep", f"{sum(job['code'] == 0 for job in jobs)} of {len(jobs)} done", str(directory))
    return max((job["code"] for job in jobs), default=0)


@functools.cache
def _end_with_the_sweep(directory: Path) -> None:
    """End this process, after its job was interrupted, when the sweep's process no longer exists, on any machine.

    A process without a job ends too, because a launcher's pool would wait forever.
    """
    lease = LeaseReader(directory / _LEASE)

    def watch() -> None:
        while lease.holder_lives is not False:
            time.sleep(SWEEP_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        while _BUSY.is_set():
            time.sleep(SWEEP_POLL_SECONDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="sweep", daemon=True).start()
