"""doctor: what is missing or broken on this machine, and the command that mends it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from speculators.errors import RecipeError
from speculators.runner import doctor as examiner
from speculators.runner.store.artifacts import store_root


def doctor(words: list[str]) -> int:
    """Look at everything; exit code 1 if something is broken."""
    options = {"run.store": "", "serve.python": ""}
    for word in words:
        name, _, value = word.partition("=")
        if name in options:
            options[name] = value
        elif word != "--json":
            raise RecipeError(f"`{word}` is not understood here", "there is run.store=PATH, serve.python=PATH, --json")
    found = examiner.examine(store_root(options["run.store"]), options["serve.python"])
    if "--json" in words:
        print(json.dumps([dataclasses.asdict(finding) for finding in found], indent=1))
    else:
        print(told(found))
    return int(any(finding.state == "broken" for finding in found))


def told(found: list[examiner.Finding]) -> str:
    """A line for each finding, and below it what mends it."""
    wide = max(len(finding.name) for finding in found)
    home = str(Path.home())
    lines = []
    for finding in found:
        message = finding.message.replace(home, "~") if home != "/" else finding.message
        lines.append(f"{finding.state:<6}  {finding.name:<{wide}}  {message}")
        if finding.fix:
            lines.append(f"{'':<{wide + 8}}  -> {finding.fix}")
    broken, warnings = (sum(f.state == state for f in found) for state in ("broken", "warn"))
    said = f"{broken} broken, {warnings} to look at" if broken or warnings else "nothing is wrong"
    return "\n".join([*lines, "", said])
