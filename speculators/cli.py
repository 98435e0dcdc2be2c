"""speculators-run: a recipe in, a trained and measured draft model out.

    speculators-run recipe=NAME [KEY=VALUE ...]       run what is not done yet
    speculators-run plan recipe=NAME [KEY=VALUE ...]  what would run, and why
    speculators-run explain STAGE recipe=NAME ...     why it is there, or not
    speculators-run -m recipe=NAME KEY=A,B            one run for each value
    speculators-run recipe=NAME --cfg job             the composed recipe
    speculators-run lock recipe=NAME                  what run.locked holds to
    speculators-run runs                              what was run
    speculators-run show RUN|last                     one run, stage by stage
    speculators-run compare RUN RUN ...|DIR           differences, metrics
    speculators-run ls [STAGE ...]                    what the store holds
    speculators-run verify [STAGE ...]                whether it still is that
    speculators-run gc [days=30] [--delete]           what nobody used for long
    speculators-run export STAGE[:KEY] ... FILE       artifacts as one file
    speculators-run import FILE                       the same into the store
    speculators-run doctor                            what this machine lacks

until=STAGE stops there, only=STAGE runs nothing else, force=STAGE makes it
anew, from=STAGE that and all that follows.

Exit codes: 0, 1 (you can mend it), 2 (a defect of ours), 128 + signal.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from speculators import ui
from speculators.errors import RecipeError, RunError, closest
from speculators.packages import installed_version

VERBS = {
    "run": "run.main",
    "plan": "query.plan",
    "explain": "query.explain",
    "lock": "lock.lock",
    "runs": "history.runs",
    "show": "history.show",
    "compare": "history.compare",
    "doctor": "doctor.doctor",
    "ls": "store.ls",
    "verify": "store.verify",
    "gc": "store.gc",
    "export": "store.export",
    "import": "store.import_",
}
"""First words, and the function below `speculators.verbs` that does it; without one, `run`. Imported when asked for."""


def main() -> None:
    """The console script: every error becomes one message and an exit code here."""
    # What starting makes is no garbage, and looking for some in it, the last time at the end, is a tenth of `plan`.
    gc.set_threshold(100_000)
    code = _guarded(sys.argv[1:])
    gc.freeze()
    sys.exit(code)


def _guarded(words: Sequence[str]) -> int:
    from speculators.runner.execution.signals import Interrupted

    try:
        if words[:1] != ["doctor"]:  # it says so itself, with all else that is wrong
            _refuse_foreign_package()
        return _dispatch(list(words))
    except RunError as failure:
        ui.error(failure)
        return 1
    except Interrupted as stop:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read stdout has gone; what it did not want to read is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        traceback.print_exc()
        print("\nerror: unexpected, a defect of speculators-run\n\nhint: report the lines above", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        return _help()
    if words[0] == "--version":
        print(installed_version("speculators-run"))
        return 0
    first = words[0]
    if first.startswith("-") or "=" in first:
        first, words = "run", ["run", *words]
    if first not in VERBS:
        raise RecipeError(f"there is no verb `{first}`", closest(first, VERBS))
    module, _, function = VERBS[first].partition(".")
    code: int = getattr(importlib.import_module(f"speculators.verbs.{module}"), function)(words[1:])
    return code


def _help() -> int:
    from speculators.config import shipped

    rows = [("  " + name, _first_comment(path)) for name, path in sorted(shipped.available().items())]
    print(f"{__doc__}\nRecipes (made of the choices in conf/; ./recipes is looked up too):\n\n{ui.columns(rows)}")
    return 0


def _first_comment(path: Path) -> str:
    comments = [line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#")]
    return next((c for c in comments if not c.startswith("@")), "")


def _refuse_foreign_package() -> None:
    """Upstream's PyPI package has the same import name; mixed files of both would fail in ways nobody can read."""
    foreign = installed_version("speculators")
    if foreign:
        raise RecipeError(
            f"the package `speculators` {foreign} is installed beside `speculators-run`, both are `import speculators`",
            "pip uninstall speculators, then reinstall speculators-run; keep upstream in an environment of its own",
        )


if __name__ == "__main__":
    main()
