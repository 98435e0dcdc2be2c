"""Expected number of tokens of a plan, with the bound that its options set.

The expectation comes from the plan's own artifacts; else from the newest ones of the same data files, adjusted to
another length of answers; else from the first rows of the data files; else it is the bound.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speculators.config.choices import DataFormat
from speculators.data.conversations import Conversation, Message, RowCounts, usable
from speculators.data.files import data_files
from speculators.data.reading import needs_pyarrow
from speculators.errors import RunError, SourceError
from speculators.runner.planning import key
from speculators.runner.planning.graph import KINDS
from speculators.runner.planning.plan import Planner, Step
from speculators.runner.store.artifact import Artifact
from speculators.runner.store.artifacts import Store

SAMPLED_CONVERSATIONS = 200
"""Conversations of a data file that are read for an estimate."""
BYTES_PER_TOKEN = 4
"""UTF-8 bytes of a token of text; between 3 and 5 for most languages, and below 3 for code and numbers."""
TOKENS_PER_MESSAGE, TOKENS_PER_CONVERSATION = 5, 20
"""Tokens that chat templates add to a message, and to a conversation (a default system prompt)."""
BYTES_PER_ROW = 1.3
"""Bytes of a row in a data file per byte of its texts."""
SIZE_ONLY = {"prompts.num_conversations", "prompts.seed", "prompts.eval_holdout_ratio", "regenerate.seed"}
"""Options that change how many conversations there are, or which of the same data, but not how long they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Tokens that a plan produces and trains on."""

    conversations: int
    answer_tokens: int
    """Tokens that the target generates, or that are supervised."""
    tokens: int
    """All tokens, those of prompts included."""
    max_tokens: int
    """Upper bound of `tokens`: every conversation is as long as the options allow."""
    source: str
    """Where the expectation comes from: `artifact`, `earlier run`, `sample` or `options`."""
    unread: list[str] = field(default_factory=list)
    """The data files that no estimate is made from, each with the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lengths:
    """Mean number of tokens of a conversation."""

    tokens: float
    answer_tokens: float
    conversations: int = 0
    """Conversations of the data file that these were sampled from, estimated."""


def workload(planner: Planner, table: Step, steps: Mapping[str, Step]) -> Workload:
    """Estimate the tokens of a plan; `table` is the step of its token table."""
    if table.artifact is not None and "tokens" in table.artifact.record:
        record = table.artifact.record
        count = int(record["tokens"])
        return Workload(
            conversations=int(record.get("conversations", record.get("rows", 0))),
            answer_tokens=int(record.get("supervised tokens", count)),
            tokens=count,
            max_tokens=count,
            source="artifact",
        )
    lineage, longest = _lineage(table, steps), planner.config.max_seq_len
    conversations = _known_conversations(planner, lineage)
    source, lengths = "earlier run", _earlier_lengths(planner, lineage, steps)
    unread: list[str] = []
    if lengths is None or not conversations:
        files, unread = _sampled_datasets(planner, lineage["prompts"], steps) if "prompts" in lineage else ([], [])
        conversations = conversations or sum(file.conversations for file in files)
        if lengths is None:
            source, lengths = "sample", _mean(files)
    if lengths is None:
        answers = planner.config.regenerate.max_tokens * (planner.config.prompts.max_turns or 1)
        source = "options"
        lengths = _Lengths(tokens=longest, answer_tokens=min(longest, answers) if "regenerate" in lineage else longest)
    return Workload(
        conversations=conversations,
        answer_tokens=round(conversations * lengths.answer_tokens),
        tokens=round(conversations * min(longest, lengths.tokens)),
        max_tokens=conversations * longest,
        source=source,
        unread=unread,
    )


def ancestors(store: Store, artifact: Artifact) -> dict[str, Artifact]:
    """The artifacts that an artifact was made from, and itself, by kind of stage, as far as the store has them."""
    by_kind, pending = {artifact.stage: artifact}, [artifact]
    while pending:
        current = pending.pop()
        takes = KINDS[current.stage].takes if current.stage in KINDS else {}
        for slot, upstream in current.provenance.get("inputs", {}).items():
            for kind in (name for name, spec in KINDS.items() if takes.get(slot) in spec.gives and name not in by_kind):
                if (earlier := store.find(kind, upstream)) is not None:
                    by_kind[kind] = earlier
                    pending.append(earlier)
    return by_kind


def _lineage(table: Step, steps: Mapping[str, Step]) -> dict[str, Step]:
    """The steps that lead to the token table, which comes first, by kind of stage; without those that fetch."""
    by_kind, pending = {table.node.kind: table}, [table]
    while pending:
        for upstream in pending.pop().node.inputs.values():
            step = steps[upstream]
            if step.node.kind != "fetch" and step.node.kind not in by_kind:
                by_kind[step.node.kind] = step
                pending.append(step)
    return by_kind


def _known_conversations(planner: Planner, lineage: Mapping[str, Step]) -> int:
    """Number of conversations that are answered; 0 if neither an artifact nor the recipe gives it."""
    prompts = lineage["prompts"].artifact if "prompts" in lineage else None
    kept = prompts.record.get("kept") if prompts is not None else None
    return int(kept or planner.config.prompts.num_conversations or 0)


def _earlier_lengths(planner: Planner, lineage: Mapping[str, Step], steps: Mapping[str, Step]) -> _Lengths | None:
    """Lengths of the nearest earlier token table that was made of the same data files by the same stages."""
    digests = {name: step.digest for name, step in steps.items() if step.digest}
    images = {kind: planner.known(step.node.name, digests) for kind, step in lineage.items()}
    best: tuple[tuple[int, str], dict[str, Artifact]] | None = None
    for table in planner.store.artifacts(next(iter(lineage))):
        if "tokens" not in table.record:
            continue
        origins = ancestors(planner.store, table)
        if origins.keys() != lineage.keys() or not _same_prompts(origins, images):
            continue
        differences = sum(len(_differences(origins[kind].preimage, images[kind])) for kind in lineage)
        rank = (-differences, str(table.provenance.get("finished", "")))
        if best is None or rank > best[0]:
            best = rank, origins
    return _lengths_of_table(planner, best[1], next(iter(lineage))) if best is not None else None


def _same_prompts(origins: Mapping[str, Artifact], images: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether two token tables begin with the same kind of prompts: same data files, filters and number of turns."""
    data = [{n: d for n, d in image["inputs"].items() if n.startswith("dataset.")} for image in images.values()]
    earlier = [origins[kind].preimage["inputs"] for kind in images]
    if any(not new.items() <= old.items() for new, old in zip(data, earlier, strict=True)):
        return False
    return "prompts" not in images or not _differences(origins["prompts"].preimage, images["prompts"])


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Options that may change the lengths of conversations, and the target, if they differ between two preimages."""
    names = [name for name, *_ in key.preimage_differences(old, new)]
    other = ("input ", "package ", "service ", "version")
    return [n for n in names if n not in SIZE_ONLY and (n == "input target" or not n.startswith(other))]


def _lengths_of_table(planner: Planner, origins: Mapping[str, Artifact], table: str) -> _Lengths | None:
    """Lengths of earlier conversations, with answers of the length that the recipe allows."""
    record = origins[table].record
    answered = origins["regenerate"].record if "regenerate" in origins else record
    conversations = int(answered.get("conversations") or record.get("rows") or 0)
    if not conversations:
        return None
    supervised = record.get("supervised tokens", record["tokens"])
    change = _answer_growth(planner, origins["regenerate"]) if "regenerate" in origins else 1.0
    return _Lengths(
        tokens=(record["tokens"] + (change - 1) * supervised) / conversations,
        answer_tokens=change * supervised / conversations,
    )


def _answer_growth(planner: Planner, answers: Artifact) -> float:
    """Length of answers under the recipe's `regenerate.max_tokens` over that of earlier ones.

    Answers that the old limit cut are expected to reach the new one.
    """
    old, new = answers.preimage["config"].get("regenerate.max_tokens"), planner.config.regenerate.max_tokens
    turns, tokens = answers.record.get("turns"), answers.record.get("answer_tokens")
    if not old or old == new or not turns or not tokens:
        return 1.0
    cut = answers.record.get("finish_reasons", {}).get("length", 0) / turns
    mean = tokens / turns
    uncut = (mean - cut * old) / (1 - cut) if cut < 1 else 0.0
    return float((cut * new + (1 - cut) * min(uncut, new)) / mean)


def _sampled_datasets(planner: Planner, prompts: Step, steps: Mapping[str, Step]) -> tuple[list[_Lengths], list[str]]:
    """Lengths of the conversations at the beginning of each data file that is on this machine.

    Also returns notes on files without any: the stage that needs such a file refuses it.
    """
    sampled: list[_Lengths] = []
    unread: list[str] = []
    for slot in prompts.node.inputs.values():
        name, path = slot.removeprefix("dataset."), steps[slot].path
        if slot != name and path is not None:
            try:
                spec = planner.config.data[name]
                files = [file for _, file in data_files(path, spec.subset, spec.split)]
                if not any(map(needs_pyarrow, files)):  # which the runner does not import
                    size = sum(file.stat().st_size for file in files)
                    sampled.append(_sampled_dataset(planner, path, name, size, answers=prompts.node.keeps_answers))
            except (RunError, OSError) as error:
                unread.append(f"no estimate by data.{name}.source ({path}): {' '.join(str(error).split())}")
    return sampled, unread


def _sampled_dataset(planner: Planner, path: Path, name: str, size: int, *, answers: bool) -> _Lengths:
    """Lengths of the first conversations of a dataset of `size` bytes; with `answers`, the data's answers are kept."""
    spec, counts = planner.config.data[name], RowCounts()
    rows = usable(path, name, spec, counts, set(), answers=answers)
    used = (row for row in rows if answers or row.content.tokens is None)
    sample = list(itertools.islice(used, SAMPLED_CONVERSATIONS))
    if not sample and counts.forms[DataFormat.tokens.name]:
        raise SourceError("its rows are token ids, which only pipeline=off_policy uses", "pipeline=off_policy")
    if not sample:
        raise counts.why_unusable(name, spec)
    total = len(sample)
    if total == SAMPLED_CONVERSATIONS:  # there are more
        rows_of_dataset = size / (sum(map(_row_bytes, sample)) / len(sample))
        total = int(rows_of_dataset * len(sample) / counts.rows)
    pairs = [_estimated_tokens(planner, row, spec.instruction, answers=answers) for row in sample]
    answer_tokens = sum(answer for _, answer in pairs)
    tokens = sum(prompt for prompt, _ in pairs) + answer_tokens
    return _Lengths(tokens=tokens / len(pairs), answer_tokens=answer_tokens / len(pairs), conversations=total)


def _row_bytes(row: Conversation) -> float:
    """Bytes that a conversation takes in its data file, by its texts or its token ids."""
    if row.content.tokens is not None:
        return len(json.dumps(row.content.tokens))
    return BYTES_PER_ROW * sum(len(message["content"].encode()) for message in row.messages)


def _estimated_tokens(planner: Planner, row: Conversation, instruction: str, *, answers: bool) -> tuple[int, int]:
    """Tokens of the prompts and of the answers of a conversation, whose first turns are used.

    An answer of the target is expected to be as long as that of the data; a data file without answers gives no hint.
    With `answers`, those of the data are used themselves, whatever the length that the target's may have.
    """
    if row.content.tokens is not None:
        ids, loss_mask = row.content.tokens
        return len(ids) - sum(loss_mask), sum(loss_mask)
    messages, limit = row.with_instruction(instruction), planner.config.regenerate.max_tokens
    prompt_tokens, answer_tokens, turns = TOKENS_PER_CONVERSATION, 0, 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            answer_tokens += _text_tokens(message) if answers else 0
            continue
        turns += message["role"] == "user"
        if turns > (planner.config.prompts.max_turns or turns):
            break
        prompt_tokens += TOKENS_PER_MESSAGE + _text_tokens(message)
        if message["role"] == "user" and not answers:
            answer_tokens += min(limit, _text_tokens(messages[index + 1])) if index + 1 < len(messages) else limit
    return prompt_tokens, answer_tokens


def _text_tokens(message: Message) -> int:
    return len(message["content"].encode()) // BYTES_PER_TOKEN


def _mean(files: Sequence[_Lengths]) -> _Lengths | None:
    """Mean lengths over the data files, each weighted by its number of conversations."""
    total = sum(file.conversations for file in files)
    if not total:
        return None
    return _Lengths(
        tokens=sum(file.conversations * file.tokens for file in files) / total,
        answer_tokens=sum(file.conversations * file.answer_tokens for file in files) / total,
    )
