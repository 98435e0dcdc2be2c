"""Every error that this program raises on purpose.

    RunError                  a person can mend it: exit code 1
    |-- RecipeError           the recipe, an override or the pipeline's wiring is wrong
    |-- SourceError           a model or a data set cannot be found, fetched or read
    |-- StoreError            the artifact store cannot be used
    |-- ServiceError          a server does not start, or died
    |-- StageError            a stage failed; carries the tail of its log
    `-- ContractError         two artifacts do not belong together, or a file is not what it says

Anything else that reaches the process edge is a defect of ours: exit code 2 and a traceback.
Every error says what is wrong in `message` and how to mend it in `hint`.
"""

from __future__ import annotations

from collections.abc import Iterable


class RunError(Exception):
    """The root: `message` is one sentence without a full stop, `hint` says the fix."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type[RunError], tuple[str, str]]:
        return type(self), (self.message, self.hint)


class RecipeError(RunError):
    """The recipe, an override or the wiring of the pipeline is wrong."""


class SourceError(RunError):
    """A model or a data set cannot be found, fetched or read."""


class StoreError(RunError):
    """The artifact store cannot be used."""


class ServiceError(RunError):
    """A server does not start, or died while it was needed."""


class StageError(RunError):
    """A stage failed."""


class ContractError(RunError):
    """Two artifacts do not belong together, or a file is not what it says it is."""


def closest(name: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """Say the closest match of a mistyped name, or list what there is; `listed`, where all is too much to read."""
    import difflib  # here: every worker imports this module, and few need a closest match

    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    there = names if listed is None else sorted(listed)
    return f"did you mean `{match[0]}`?" if match else f"there is: {', '.join(there) or 'nothing'}"
