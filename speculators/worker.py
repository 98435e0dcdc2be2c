"""`python -m speculators.worker REQUEST.json`: one attempt at one stage, from the claim to the published artifact.

This is the only unit that is ever started, whatever starts it, and the one module on the line: it knows the store
on the left and calls the stage on the right. Run by hand it does the same as under a run.

Exit codes: 0 the artifact (or this phase of it) is there; 1 a `RunError`, said on standard error and in
`failure.json`; 2 anything else, with a traceback; 143 or 130 asked to stop. Except on success the work directory
stays, and the next attempt goes on in it. With `--held`, standard input is a pipe whose end means that the runner
is gone: then this process ends too.

Under `torchrun -m speculators.worker REQUEST.json`, on one machine or on several that see the same store, the first
process is the worker. The others only help it with the stage, which has to know how; `train` does.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from speculators.errors import RunError
from speculators.job import Job, Request, write_json
from speculators.provenance import Provenance
from speculators.runner.store.artifacts import Store, no_space

HELD = "--held"
HEARTBEAT_SECONDS = 10.0
GRACE = 30.0
"""Seconds from asking ourselves to stop to being killed, once the runner is gone."""


def main(arguments: list[str]) -> int:
    """Do what a request says; returns the exit code."""
    named, held = [word for word in arguments if word != HELD], HELD in arguments
    if len(named) != 1 or named[0].startswith("-"):
        print(f"usage: python -m speculators.worker REQUEST.json [{HELD}]", file=sys.stderr)
        return 1
    path = Path(named[0])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    if held:
        threading.Thread(target=_die_with_the_runner, name="runner-watch", daemon=True).start()
    request = Request.read(path)
    job = request.job()
    try:
        with _full_disk_in_words(job), _import_error_in_words():
            if _follows():
                # Where the first process finds the artifact there is nothing to help with, and nobody to wait for.
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
    """Claim, look again, run the stage, publish."""
    store = Store(Path(request.store))
    provenance = request.provenance
    reads = provenance.get("inputs", {}).values()
    with store.claim(job.stage, job.key, _say_waiting, run=provenance.get("run", ""), uses=reads):
        if store.find(job.stage, job.key) is None:
            aside = store.quarantine(job.stage, job.key)
            if aside is not None:
                print(f"warning: an artifact that is not whole was set aside: {aside}", file=sys.stderr)
        elif not request.forced:
            store.discard_work(job.stage, job.key)
            return
        if _phase_done(request, job).exists():
            return
        _make_directories(job)
        with Provenance() as surroundings:
            _run_and_publish(request, job, store, surroundings)


def _run_and_publish(request: Request, job: Job, store: Store, surroundings: Provenance) -> None:
    """One phase of the stage; the last one publishes."""
    started, clock = _now(), time.monotonic()
    with _Heartbeat(job.work, started):
        _stage(job)
    seconds = round(time.monotonic() - clock, 3)
    if request.phase + 1 < request.phases:
        write_json(_phase_done(request, job), {"seconds": seconds, "record": job.record})
        return
    store.publish(
        job.stage,
        job.key,
        preimage=request.preimage,
        record={**job.record, "seconds": seconds},
        provenance={
            **request.provenance,
            **surroundings.facts(),
            "options": request.config,
            "started": started,
            "finished": _now(),
        },
        digest=request.digest,
        written=job.digests_written,
        replace=request.forced,
    )


def _stage(job: Job) -> None:
    importlib.import_module(f"speculators.stages.{job.stage}").main(job)


def _follows() -> bool:
    """Whether torchrun has started this process beside a first one, which claims, reports and publishes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def _phase_done(request: Request, job: Job) -> Path:
    return job.scratch / f"phase-{request.phase}.done"


def _make_directories(job: Job) -> None:
    """data/ and scratch/ may hold what an earlier attempt left; what it said about itself is over."""
    for directory in (job.output, job.scratch):
        directory.mkdir(parents=True, exist_ok=True)
    for name in ("failure.json", "progress.json"):
        (job.work / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _full_disk_in_words(job: Job) -> Iterator[None]:
    """A disk that is full, or a quota that is used up, is no defect, whichever library met it first."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        met = _out_of_space(error)
        if met is None:
            raise
        raise no_space(met, met.filename or job.work) from error


@contextlib.contextmanager
def _import_error_in_words() -> Iterator[None]:
    """A package that is missing or does not load is the environment's fault, and the doctor knows what helps."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        from speculators.runner import doctor  # only now: a stage that loads needs none of it

        failure = doctor.import_failure(error)
        if failure is None:
            raise
        package, hint = failure
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"`{package}` cannot be imported: {reason}", hint) from error


def _out_of_space(error: BaseException | None) -> OSError | None:
    """The error of a full disk that this one is or came from. Libraries in Rust and C++ say it in their text only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        if os.strerror(errno.ENOSPC) in str(error):
            return OSError(errno.ENOSPC, str(error))
        error = error.__cause__ or error.__context__
    return None


class _Heartbeat:
    """Rewrites heartbeat.json while the stage runs, for those who cannot see this process."""

    def __init__(self, work: Path, started: str) -> None:
        self._path = work / "heartbeat.json"
        self._plain = {"pid": os.getpid(), "host": os.uname().nodename, "started": started}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # a full disk is for the stage to meet
                write_json(self._path, {**self._plain, "beat": _now()})
            if self._over.wait(HEARTBEAT_SECONDS):
                return


def _write_failure(job: Job, message: str, hint: str, kind: str) -> None:
    """For the runner to quote. Where even that cannot be written, standard error has it."""
    if _follows():
        return
    try:
        job.work.mkdir(parents=True, exist_ok=True)
        write_json(job.work / "failure.json", {"message": message, "hint": hint, "kind": kind})
    except OSError as error:
        print(f"warning: failure.json could not be written: {error}", file=sys.stderr)


def _say_waiting(holder: str) -> None:
    print(f"waiting: {holder} is making this", file=sys.stderr)


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind: `finally` blocks run, the claim ends, the work directory stays."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _die_with_the_runner() -> None:
    """Wait for the end of standard input; then stop, and if that takes too long, kill the whole group."""
    while os.read(0, 512):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
