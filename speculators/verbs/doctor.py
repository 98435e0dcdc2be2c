"""doctor: check this machine, and print the command that fixes each problem."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from speculators import ui
from speculators.runner import doctor as examiner
from speculators.runner.store.artifacts import store_root
from speculators.verbs import usage


def doctor(argv: list[str]) -> int:
    """Check everything; exit code 1 if something is broken."""
    arguments = usage.parse("doctor", argv)
    store, python = (arguments.options.get(name, "") for name in ("run.store", "serve.python"))
    findings = examiner.examine(store_root(store), python)
    if arguments.as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print(format_findings(findings))
    return int(any(finding.state == "broken" for finding in findings))


def format_findings(findings: list[examiner.Finding]) -> str:
    """Format findings: a line for each, followed by its fix."""
    wide = max(len(finding.name) for finding in findings)
    home = str(Path.home())
    lines = []
    for finding in findings:
        text = finding.message.replace(home, "~") if home != "/" else finding.message
        lines.append(ui.filled(f"{finding.state:<6}  {finding.name:<{wide}}  {text}", ui.width(), wide + 8))
        if finding.fix:  # a command, which is not wrapped
            lines.append(f"{'':<{wide + 8}}  -> {finding.fix}")
    broken, warnings = (sum(f.state == state for f in findings) for state in ("broken", "warn"))
    summary = f"broken: {broken}, warnings: {warnings}" if broken or warnings else "no problems"
    return "\n".join([*lines, "", summary])
