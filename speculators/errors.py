"""The errors that this program raises on purpose.

    RunError                  the user can fix it: exit code 1
    |-- RecipeError           the recipe, an override or the pipeline is wrong
    |-- SourceError           a model or a dataset cannot be found, fetched or read
    |-- StoreError            the artifact store cannot be used
    |-- ServiceError          a server does not start, or died
    |-- StageError            a stage failed; carries the tail of its log
    `-- ContractError         artifacts do not match, or a file has the wrong content

Any other exception is a defect of this program: exit code 2 and a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


class RunError(Exception):
    """Base class: `message` describes the problem, without a full stop; `hint` is the fix."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type[RunError], tuple[str, str]]:
        return type(self), (self.message, self.hint)


class RecipeError(RunError):
    """The recipe, an override or the pipeline is wrong."""


class SourceError(RunError):
    """A model or a dataset cannot be found, fetched or read."""


class StoreError(RunError):
    """The artifact store cannot be used."""


class ServiceError(RunError):
    """A server does not start, or died while it was needed."""


class StageError(RunError):
    """A stage failed."""


class ContractError(RunError):
    """Artifacts do not match, or a file has the wrong content."""


def closest(name: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """Hint for a mistyped name: the closest of the `known` names, else all of them, or those in `listed`."""
    import difflib  # imported here because most processes never need it

    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    options = names if listed is None else sorted(listed)
    return f"did you mean `{match[0]}`?" if match else f"there is: {', '.join(options) or 'nothing'}"
