"""What every Python of a crash test imports first: more stages, and one place where something is killed.

CRASH_POINT is JSON: {"role": "runner" | "worker" | "worker NODE", "call": "module:name", "when": "before" | "after",
"nth": 1, "said": first argument, "victim": "self" | "runner" | "server" | "guard"}. Nothing in the product knows of it.
"""

import functools
import importlib
import json
import os
import signal
import sys
from pathlib import Path

import speculators.stages

speculators.stages.__path__.append(str(Path(__file__).parents[1] / "stages"))


def victims(which):
    if which == "self":
        return [os.getpid()]
    if which == "runner":
        return [os.getppid()]
    pids = []
    for file in Path(os.environ["CRASH_WORLD"]).glob("store/services/*/pids.json"):
        plain = json.loads(file.read_text())
        pids += [plain["guard"]["pid"]] if which == "guard" else [p["pid"] for p in plain["processes"]]
    return pids


def strike(which):
    """Once in a world: what comes after it must not be struck again."""
    try:
        os.close(os.open(Path(os.environ["CRASH_WORLD"]) / "struck", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    for pid in victims(which):
        os.kill(pid, signal.SIGKILL)


def arm(point):
    module, _, path = point["call"].partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    inner, hits = getattr(owner, name), [0]

    @functools.wraps(inner)
    def call(*words, **named):
        hits[0] += "said" not in point or point["said"] in words
        here = hits[0] == point.get("nth", 1)
        if here and point["when"] == "before":
            strike(point["victim"])
        result = inner(*words, **named)
        if here and point["when"] == "after":
            strike(point["victim"])
        return result

    setattr(owner, name, call)


def role():
    """What this process is to a crash test: `runner`, `worker NODE`, or nothing."""
    words = " ".join(sys.orig_argv)
    if "speculators.worker" in words:
        return "worker " + Path(sys.orig_argv[-2]).stem.rpartition("-")[0]
    return "runner" if "crash_runner.py" in words else ""


if "CRASH_POINT" in os.environ:
    armed = json.loads(os.environ["CRASH_POINT"])
    if role().startswith(armed["role"]):
        arm(armed)
