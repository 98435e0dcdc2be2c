"""The entry point: sends the command line to its verb, and converts every error to a message and an exit code.

Exit codes: 0 success, 1 error with a hint, 2 defect of this program, 128 + number of the signal that stopped it.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import sys
import traceback
from collections.abc import Sequence

from speculators import ui
from speculators.errors import RecipeError, RunError
from speculators.packages import installed_version
from speculators.verbs import usage


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
    except Exception as failure:
        if (explained := _of_this_machine(failure)) is not None:
            ui.error(explained)
            return 1
        traceback.print_exc()
        print("\nerror: unexpected, a defect of speculators-run\n\nhint: report the traceback above", file=sys.stderr)
        return 2


def _of_this_machine(failure: Exception) -> RunError | None:
    """The error for a file that the user may not read or write, or a home that is unknown; None for another failure."""
    if isinstance(failure, PermissionError | IsADirectoryError | NotADirectoryError) and failure.filename:
        return RunError(f"{failure.filename}: {failure.strerror}", "check the path, and who may read and write it")
    if isinstance(failure, RuntimeError) and "home directory" in str(failure):  # of pathlib
        return RunError("~ names a home directory, and there is none", "export HOME=DIRECTORY, or write the whole path")
    return None


def _dispatch(argv: list[str]) -> int:
    verb = argv[0] if argv else "help"
    if verb in (*usage.HELP, "help"):
        print(usage.verb_help(argv[1]) if argv[1:] else usage.program_help())
        return 0
    if verb == "--version":
        print(installed_version(usage.PROGRAM))
        return 0
    if verb not in usage.VERBS:
        if not verb.startswith("-") and "=" not in verb:
            raise usage.unknown_verb(verb)
        verb, argv = "run", ["run", *argv]
    # What follows `--` is for another program.
    if {*itertools.takewhile(lambda argument: argument != "--", argv[1:])} & {*usage.HELP}:
        print(usage.verb_help(verb))
        return 0
    module, _, function = usage.VERBS[verb].function.partition(".")
    code: int = getattr(importlib.import_module(f"speculators.verbs.{module}"), function)(argv[1:])
    return code


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
