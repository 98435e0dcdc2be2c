"""`python -m speculators.worker REQUEST.json`: run an attempt at a stage, from the claim to the published artifact.

Every executor starts this program. It is the only module that imports both the store and the stages, and it does the
same when it is started by hand.

Exit codes: 0 the artifact (or its phase) exists; 1 a `RunError`, reported on standard error and in `failure.json`; 2
any other exception, with a traceback; 143 or 130 stopped by a signal. Except on success the work directory stays, and
the next attempt resumes in it. With `--held`, standard input is a pipe that closes when the runner has ended: then this
process ends too.

Under `torchrun -m speculators.worker REQUEST.json`, on machines that share the store, rank 0 is the worker. Other ranks
only run the stage, which must support that, as `train` does.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from speculators.errors import RunError
from speculators.job import Job, Request, phase_marker, write_json
from speculators.provenance import Provenance
from speculators.runner.store.artifacts import PREIMAGE, Store, no_space
from speculators.timeouts import WORKER_GRACE_SECONDS, WORKER_HEARTBEAT_SECONDS

PIPE_FLAG = "--held"


def main(arguments: list[str]) -> int:
    """Run a request; returns the exit code."""
    paths, has_pipe = [argument for argument in arguments if argument != PIPE_FLAG], PIPE_FLAG in arguments
    if len(paths) != 1 or paths[0].startswith("-"):
        print(f"usage: python -m speculators.worker REQUEST.json [{PIPE_FLAG}]", file=sys.stderr)
        return 1
    path = Path(paths[0])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    if has_pipe:
        threading.Thread(target=_die_with_the_runner, name="runner-watch", daemon=True).start()
    request = Request.read(path)
    job = request.job()
    try:
        with _translate_full_disk(job), _translate_import_error():
            if _follows():
                # If the artifact exists, rank 0 does not run the stage.
                if request.forced or Store(Path(request.store)).find(job.stage, job.key) is None:
                    _stage(job)
            else:
                _attempt(request, job)
    except RunError as error:
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        _write_failure(job, error.message, error.hint, type(error).__name__)
        return 1
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        _write_failure(
            job, f"{type(error).__name__}: {error}", "this is a defect; its traceback is in the log", "defect"
        )
        return 2
    return 0


def _attempt(request: Request, job: Job) -> None:
    """Claim the key, check the store again, run the stage and publish."""
    store = Store(Path(request.store))
    provenance = request.provenance
    reads = [*provenance.get("inputs", {}).values(), *provenance.get("reuse", ())]
    with store.claim(job.stage, job.key, _report_waiting, run=provenance.get("run", ""), uses=reads):
        if store.find(job.stage, job.key) is None:
            moved_to = store.quarantine(job.stage, job.key)
            if moved_to is not None:
                print(f"warning: a damaged artifact was moved to quarantine: {moved_to}", file=sys.stderr)
        elif not request.forced:
            store.discard_work(job.stage, job.key)
            return
        if _phase_done(request, job).exists():
            return
        _make_directories(job)
        write_json(job.work / PREIMAGE, request.preimage)
        with Provenance() as surroundings:
            _run_and_publish(request, job, store, surroundings)


def _run_and_publish(request: Request, job: Job, store: Store, surroundings: Provenance) -> None:
    """Run a phase of the stage; the last one publishes."""
    started, clock = _now(), time.monotonic()
    with _Heartbeat(job.work, started):
        importlib.import_module(_module(job))
        import_seconds = round(time.monotonic() - clock, 3)
        _stage(job)
    seconds = round(time.monotonic() - clock, 3)
    if request.phase + 1 < request.phases:
        write_json(_phase_done(request, job), {"seconds": seconds, "record": job.record})
        return
    store.publish(
        job.stage,
        job.key,
        preimage=request.preimage,
        record={**job.record, "seconds": seconds + _seconds_of_earlier_phases(job)},
        provenance={
            **request.provenance,
            **surroundings.facts(),
            "options": request.config,
            "import_seconds": import_seconds,
            "started": started,
            "finished": _now(),
        },
        digest=request.digest,
        written=job.digests_written,
        replace=request.forced,
    )


def _stage(job: Job) -> None:
    importlib.import_module(_module(job)).main(job)


def _module(job: Job) -> str:
    return f"speculators.stages.{job.stage}"


def _follows() -> bool:
    """Whether this is a rank above 0 of torchrun; rank 0 claims, reports and publishes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def _phase_done(request: Request, job: Job) -> Path:
    return job.scratch / phase_marker(request.phase, [*request.services, *request.orders])


def _seconds_of_earlier_phases(job: Job) -> float:
    """Seconds of all phases but the last, whose markers have the names of their own servers."""
    return sum(float(json.loads(path.read_text())["seconds"]) for path in job.scratch.glob("phase-*.done"))


def _make_directories(job: Job) -> None:
    """Create data/ and scratch/, which may have files of an earlier attempt, and delete that attempt's reports."""
    for directory in (job.output, job.scratch):
        directory.mkdir(parents=True, exist_ok=True)
    for name in ("failure.json", "progress.json"):
        (job.work / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _translate_full_disk(job: Job) -> Iterator[None]:
    """Translate the error of a full disk or an exceeded quota, of whatever library, into a `StoreError`."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        disk_error = _out_of_space(error)
        if disk_error is None:
            raise
        raise no_space(disk_error, disk_error.filename or job.work) from error


@contextlib.contextmanager
def _translate_import_error() -> Iterator[None]:
    """Translate the error of a package that is missing or does not load, with the doctor's hint."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        from speculators.runner import doctor  # imported only for an error

        failure = doctor.import_failure(error)
        if failure is None:
            raise
        package, hint = failure
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"`{package}` cannot be imported: {reason}", hint) from error


def _out_of_space(error: BaseException | None) -> OSError | None:
    """The error of a full disk in a chain of exceptions; that of libraries in Rust and C++ is only in the text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        if os.strerror(errno.ENOSPC) in str(error):
            return OSError(errno.ENOSPC, str(error))
        error = error.__cause__ or error.__context__
    return None


class _Heartbeat:
    """Rewrites heartbeat.json while the stage runs, for observers on other machines."""

    def __init__(self, work: Path, started: str) -> None:
        self._path = work / "heartbeat.json"
        self._content = {"pid": os.getpid(), "host": os.uname().nodename, "started": started}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._write, name="heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # the stage reports a full disk
                write_json(self._path, {**self._content, "beat": _now()})
            if self._stopped.wait(WORKER_HEARTBEAT_SECONDS):
                return


def _write_failure(job: Job, message: str, hint: str, kind: str) -> None:
    """Write failure.json for the runner; if that fails, standard error has the message."""
    if _follows():
        return
    try:
        job.work.mkdir(parents=True, exist_ok=True)
        write_json(job.work / "failure.json", {"message": message, "hint": hint, "kind": kind})
    except OSError as error:
        print(f"warning: failure.json could not be written: {error}", file=sys.stderr)


def _report_waiting(holder: str) -> None:
    print(f"waiting: {holder} makes the same artifact", file=sys.stderr)


def _stop(number: int, frame: FrameType | None) -> None:
    """Exit by an exception: `finally` blocks run, the claim is released, the work directory stays."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _die_with_the_runner() -> None:
    """Wait for the end of standard input, then stop; after `WORKER_GRACE_SECONDS` kill the process group."""
    while os.read(0, 512):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(WORKER_GRACE_SECONDS)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
