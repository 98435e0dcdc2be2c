"""completion: tab completion for bash, zsh and fish.

Each shell's script calls `speculators-run completion candidates WORD ...` with the words before the cursor, and gets
the completions of the last one, a line each: the whole word, a tab, its meaning. Hydra's own completion would compose
the recipe at every key press, and knows no verbs, flags, runs or stages.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from speculators.config import documentation
from speculators.config.documentation import GROUPS, KEYED, OptionInfo
from speculators.config.execution import RunOptions
from speculators.config.fields import MISSING, as_override
from speculators.errors import RecipeError, closest
from speculators.verbs import usage
from speculators.verbs.usage import VERBS, Verb

CANDIDATES = "candidates"
MEANING_WIDTH = 56
"""Columns of a meaning, so that most candidates with it take one line."""
_BASH = """\
_speculators_run() {
    local line=${COMP_LINE:0:COMP_POINT} words=() candidate part head
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    # readline splits words at `=` and `:`, and replaces only what follows.
    part=${COMP_WORDS[COMP_CWORD]}
    [[ $part == [=:] ]] && part=""
    head=${words[${#words[@]}-1]%"$part"}
    COMPREPLY=()
    while IFS=$'\\t' read -r candidate _; do
        COMPREPLY+=("${candidate#"$head"}")
    done < <("${words[0]/#\\~/$HOME}" completion candidates "${words[@]:1}" 2>/dev/null)
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _speculators_run speculators-run
"""
_ZSH = """\
_speculators_run() {
    local candidate meaning
    local -a open open_texts closed closed_texts
    while IFS=$'\\t' read -r candidate meaning; do
        if [[ $candidate == *[=./] ]]; then
            open+=("$candidate") open_texts+=("$candidate  $meaning")
        else
            closed+=("$candidate") closed_texts+=("$candidate  $meaning")
        fi
    done < <("${words[1]/#\\~/$HOME}" completion candidates "${(@)words[2,CURRENT]}" 2>/dev/null)
    compadd -l -S '' -d open_texts -a open
    compadd -l -d closed_texts -a closed
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _speculators_run speculators-run
"""
_FISH = """\
function __speculators_run
    set -l words (commandline -opc) (commandline -ct)
    $words[1] completion candidates $words[2..-1] 2>/dev/null
end
complete -c speculators-run -f -a '(__speculators_run)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion(argv: list[str]) -> int:
    """Print a shell's script, or the candidates for the last word of a command line."""
    if argv[:1] == [CANDIDATES]:
        for candidate, meaning in candidates(argv[1:] or [""]):
            print(f"{candidate}\t{textwrap.shorten(meaning, MEANING_WIDTH, placeholder='...')}")
        return 0
    arguments = usage.parse("completion", argv)
    shell = arguments.names[0] if len(arguments.names) == 1 else ""
    if shell not in _SCRIPTS:
        hint = closest(shell, _SCRIPTS) if shell else 'eval "$(speculators-run completion bash)", or zsh, or fish'
        raise RecipeError("completion needs the name of a shell: bash, zsh or fish", hint)
    sys.stdout.write(_SCRIPTS[shell])
    return 0


def candidates(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Completions of the last of these arguments, which follow the program's name, each with its meaning."""
    *before, current = argv
    name = before[0] if before and before[0] in VERBS else "run"
    everything = dict(_flag_values(VERBS[name], before, current) or _arguments(name, before, current))
    return [(each, meaning) for each, meaning in everything.items() if each.startswith(current)]


def _flag_values(verb: Verb, before: Sequence[str], current: str) -> list[tuple[str, str]]:
    """The values of the flag before the cursor; empty if there is none, or it takes no value."""
    values = verb.flags.get(usage.long_flag(before[-1]), "") if before else ""
    return [(value, "") for value in values.strip("[]").split("|")] if "|" in values and current[:1] != "-" else []


def _arguments(name: str, before: Sequence[str], current: str) -> Iterator[tuple[str, str]]:
    verb = VERBS[name]
    if current.startswith("-"):
        yield from ((row.split()[0], meaning) for row, meaning in verb.takes.items() if row.startswith("-"))
        yield "--help", "print the arguments"
        return
    option, equals, value = current.partition("=")
    if equals:
        yield from ((f"{option}={each}", meaning) for each, meaning in _values(option, value))
        return
    if not before:
        yield from ((verb_name, verb.summary) for verb_name, verb in VERBS.items())
    if before == ["help"]:
        yield from ((verb_name, verb.summary) for verb_name, verb in VERBS.items())
    yield from _positional(verb, len([each for each in before[1:] if "=" not in each and each[:1] != "-"]))
    if verb.composes:
        yield from _options(current)
    yield from ((row.split("=")[0] + "=", meaning) for row, meaning in verb.takes.items()
                if "=" in row and row[:1] != "-" and row != usage.OVERRIDES)  # fmt: skip


def _positional(verb: Verb, index: int) -> Iterator[tuple[str, str]]:
    """Values of the positional argument of this index."""
    if not verb.names:
        return
    kind = verb.names[min(index, len(verb.names) - 1)]
    if kind.startswith("STAGE"):
        yield from _stages()
    elif kind in ("RUN", "DIRECTORY"):
        yield "last", "the latest run"
        runs = Path(RunOptions().dir)
        yield from ((path.parent.name, "") for path in sorted(runs.glob("*/events.jsonl"), reverse=True))
    elif kind == "SECTION|NAME":
        yield from ((name, option.meaning) for name, option in _shown_options().items())
        yield from ((name.partition(".")[0], "section") for name in documentation.all_options() if "." in name)
    elif "|" in kind:
        yield from ((choice, "") for choice in kind.split("|"))


def _stages() -> Iterator[tuple[str, str]]:
    from speculators.runner.planning.graph import KINDS  # imported on use: most completions need none

    yield from ((kind, "") for kind in KINDS if kind != "fetch")


def _options(current: str) -> Iterator[tuple[str, str]]:
    """Config groups and the options of the section that is being typed; of other sections only their names."""
    section = current.rpartition(".")[0]
    if not section:
        yield from ((f"{group}=", "a choice for the whole section") for group in GROUPS)
    for name, option in _shown_options().items():
        parent = name.rpartition(".")[0]
        if parent == section:
            yield f"{name}=", _first_sentence(option)
        elif f"{parent}.".startswith(f"{section}." if section else ""):
            below = parent.removeprefix(f"{section}." if section else "").partition(".")[0]
            yield f"{section}.{below}." if section else f"{below}.", f"options of {below}"


def _shown_options() -> dict[str, OptionInfo]:
    """All options but those whose name has a key that the recipe defines."""
    return {name: option for name, option in documentation.all_options().items() if KEYED not in name}


def _values(option: str, value: str) -> Iterator[tuple[str, str]]:
    """Values of an option: choices, `true` and `false`, stages, paths, and its default."""
    if value.startswith((".", "/", "~")):
        yield from ((path, "") for path in _paths(value))
    elif option in GROUPS:
        yield from documentation.group_choices(option).items()
    elif option in ("until", "only", "from", "force"):
        yield from _stages()
    elif known := documentation.all_options().get(option):
        if known.type.startswith("true or false"):
            yield from (("true", ""), ("false", ""))
        brackets = known.type.startswith("list")
        yield from ((f"[{name}]" if brackets else name, meaning) for name, meaning in known.choices.items())
        if known.default not in (MISSING, "", [], {}):
            yield as_override(known.default).replace(" ", ""), "the default"


def _paths(beginning: str) -> Iterator[str]:
    """Paths that begin so; directories end in a slash."""
    parent, _, name = beginning.rpartition("/")
    directory = Path(parent or ("/" if beginning.startswith("/") else ".")).expanduser()
    if "/" in beginning and directory.is_dir():
        for path in sorted(directory.iterdir()):
            if path.name.startswith(name):
                yield f"{parent}/{path.name}{'/' if path.is_dir() else ''}"


def _first_sentence(option: OptionInfo) -> str:
    return option.meaning.partition(". ")[0].rstrip(".")
