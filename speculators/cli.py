"""speculators-run: train and evaluate a draft model for speculative decoding.

usage: speculators-run [VERB] [ARGUMENT ...]

  recipe=NAME [OPTION=VALUE ...]   run all stages without a cached artifact
    until=STAGE                      stop after this stage
    only=STAGE                       run only this stage
    force=STAGE                      run this stage although it is cached
    from=STAGE                       the same, with all later stages
    --cfg job                        print the composed recipe
  -m recipe=NAME OPTION=A,B        run the recipe for each value
  plan recipe=NAME ...             print what would run, and why
  explain STAGE recipe=NAME ...    explain the cache hit or miss of a stage
  lock recipe=NAME ...             record what run.locked=true compares with
  runs                             list earlier runs
  show RUN|last                    show a run, stage by stage
  compare RUN RUN ...|DIRECTORY    compare options and metrics of runs
  ls [STAGE ...]                   list the artifacts of the store
  verify [STAGE ...] [--quarantine]
                                   re-hash artifacts and report damage
  gc [days=N] [--delete]           delete artifacts unused for N days
                                   (dry run by default; N=30)
  export STAGE[:KEY] ... FILE      write artifacts into one file
  import FILE                      add the artifacts of such a file
  doctor                           check this machine

Exit codes: 0 success, 1 error with a hint, 2 defect of this program,
128 + number of the signal that stopped it.
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
    "run": "run.run",
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
"""Functions in `speculators.verbs` by verb, imported on use; without a verb, `run`."""

_HELP = ("--help", "-h", "help")


def main() -> None:
    """Run the command line, and convert every error to a message and an exit code."""
    # Collecting garbage, of which imports make none, takes a tenth of `plan`.
    gc.set_threshold(100_000)
    code = _guarded(sys.argv[1:])
    gc.freeze()
    sys.exit(code)


def _guarded(argv: Sequence[str]) -> int:
    from speculators.runner.execution.signals import Interrupted

    try:
        if argv[:1] != ["doctor"]:  # doctor reports the package among its findings
            _refuse_foreign_package()
        return _dispatch(list(argv))
    except RunError as failure:
        ui.error(failure)
        return 1
    except Interrupted as stop:
        print("stopped; the same command resumes the run", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout has closed the pipe, which is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        traceback.print_exc()
        print("\nerror: unexpected, a defect of speculators-run\n\nhint: report the traceback above", file=sys.stderr)
        return 2


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in _HELP or (argv[0] in VERBS and argv[0] != "run" and {*argv[1:]} & {*_HELP}):
        return _help()
    if argv[0] == "--version":
        print(installed_version("speculators-run"))
        return 0
    verb = argv[0]
    if verb.startswith("-") or "=" in verb:
        verb, argv = "run", ["run", *argv]
    if verb not in VERBS:
        raise RecipeError(f"there is no verb `{verb}`", closest(verb, VERBS))
    module, _, function = VERBS[verb].partition(".")
    code: int = getattr(importlib.import_module(f"speculators.verbs.{module}"), function)(argv[1:])
    return code


def _help() -> int:
    from speculators.config import shipped

    rows = [("  " + name, _first_comment(path)) for name, path in sorted(shipped.available().items())]
    print(f"{__doc__}\nRecipes, shipped and in ./recipes:\n\n{ui.columns(rows)}")
    return 0


def _first_comment(path: Path) -> str:
    comments = [line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#")]
    return next((c for c in comments if not c.startswith("@")), "")


def _refuse_foreign_package() -> None:
    """Refuse to run next to upstream's PyPI package, which has the same import name."""
    foreign = installed_version("speculators")
    if foreign:
        raise RecipeError(
            f"the packages `speculators` {foreign} and `speculators-run` have the same import name",
            "pip uninstall speculators, then reinstall speculators-run; install upstream in another environment",
        )


if __name__ == "__main__":
    main()
