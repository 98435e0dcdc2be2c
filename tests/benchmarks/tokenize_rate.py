"""Rate, memory and growth of `tokenize` with the data's own answers, beside `datasets.map` with the same template.

    python -m tests.benchmarks.tokenize_rate TARGET_DIRECTORY ROWS [--rows 4000] [--rounds 2]

TARGET_DIRECTORY has a tokenizer with a chat template; ROWS is the ShareGPT file of the demo. Both sides tokenize the
same conversations in turns, in processes of their own, on all cores. Printed: conversations a second and a CPU second,
peak memory of all processes together, and the time of one conversation of 160 turns over that of one of 10.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from speculators.config.choices import DataFormat
from speculators.config.schema import Config, Dataset
from speculators.data.conversations import RowCounts, read_conversations


def write_rows(path: Path, source: Path, count: int) -> None:
    """The first `count` conversations of a file that a user begins and the assistant ends, as `prompts` writes them."""
    spec = Dataset(source=str(source), format=DataFormat.sharegpt)
    rows = (c.messages for c in read_conversations(source, "sharegpt", spec, RowCounts()))
    usable = (m for m in rows if m[0]["role"] == "user" and m[-1]["role"] == "assistant")
    with path.open("w", encoding="utf-8") as file:
        for number, messages in enumerate(itertools.islice(usable, count)):
            file.write(json.dumps({"id": str(number), "source": "sharegpt", "messages": messages}) + "\n")


def ours(target: Path, conversations: Path, work: Path) -> None:
    """Run the stage."""
    from speculators.stages import tokenize
    from tests.stages.jobs import make_job

    config = Config()
    config.max_seq_len = 1 << 20
    tokenize.main(make_job("tokenize", work, config, conversations=conversations, target=target))


def theirs(target: Path, conversations: Path, work: Path) -> None:
    """Run `datasets.map` on as many processes as there are cores."""
    from datasets import Dataset as Table
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    lines = (conversations / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    table = Table.from_list([{"messages": json.loads(line)["messages"]} for line in lines])

    def tokenized(row: dict[str, Any]) -> dict[str, Any]:
        return dict(tokenizer.apply_chat_template(row["messages"], return_assistant_tokens_mask=True, return_dict=True))

    cores = len(os.sched_getaffinity(0))
    table.map(tokenized, num_proc=cores, remove_columns=["messages"]).save_to_disk(work)


def measured(side: str, *arguments: Path) -> dict[str, float]:
    """Run one side in a process; seconds, CPU seconds of it and its children, and their memory, in MiB."""
    command = [sys.executable, "-m", "tests.benchmarks.tokenize_rate", "--side", side, *map(str, arguments)]
    began, peak = time.monotonic(), [0]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        watched = threading.Thread(target=watch, args=(process, peak))
        watched.start()
        output, _ = process.communicate()
        watched.join()
    if process.returncode:
        raise SystemExit(f"{side} ended with {process.returncode}")
    return {"seconds": time.monotonic() - began, "peak_mib": peak[0] / 2**10, **json.loads(output.splitlines()[-1])}


def watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    """Keep the most memory, in KiB, that the processes of a session have together; shared pages count once."""
    while process.poll() is None:
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(stat.read_text().rpartition(")")[2].split()[3]) == process.pid:
                    total += int((stat.parent / "smaps_rollup").read_text().partition("Pss:")[2].split()[0])
            except (OSError, IndexError):  # it ended
                continue
        peak[0] = max(peak[0], total)
        time.sleep(0.2)


def run_side(side: str, target: Path, conversations: Path, work: Path) -> None:
    """Run one side here; prints its CPU seconds, without those of the start."""
    {"ours": ours, "theirs": theirs}[side](target, conversations, work)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"cpu_seconds": sum(u.ru_utime + u.ru_stime for u in used)}))


def growth(target: Path, conversations: Path) -> float:
    """Time of a conversation of 160 turns over that of one of 10, both after another one."""
    from speculators.stages.tokenize import _Worker

    worker = _Worker(target, {})
    messages = [m for line in (conversations / "conversations.jsonl").open() for m in json.loads(line)["messages"]]
    pairs = list(itertools.islice(zip(messages[::2], messages[1::2], strict=False), 160))
    seconds = {}
    for turns in (10, 160, 10, 160):
        talk = [m for pair in pairs[:10] * (turns // 10) for m in pair]
        line = json.dumps({"id": "a", "source": "s", "messages": talk}).encode()
        began = time.process_time()
        for _ in range(5):
            worker.chunk([line])
        seconds[turns] = time.process_time() - began
    return seconds[160] / seconds[10]


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=("ours", "theirs"))
    options = parser.parse_args()
    if options.side:
        run_side(options.side, *options.paths)
        return
    target, source = options.paths
    with tempfile.TemporaryDirectory() as scratch:
        conversations = Path(scratch) / "in"
        conversations.mkdir()
        write_rows(conversations / "conversations.jsonl", source, options.rows)
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(options.rounds):
            for side, values in rates.items():
                facts = measured(side, target, conversations, Path(scratch) / f"{side}{number}")
                values.append(options.rows / facts["cpu_seconds"])
                print(
                    f"{side:6}  {options.rows / facts['seconds']:7.1f}/s  {values[-1]:7.1f}/CPU s  "
                    f"{facts['peak_mib']:6.0f} MiB"
                )
        best = {side: max(values) for side, values in rates.items()}
        print(f"CPU rate over theirs: {best['ours'] / best['theirs']:.2f}")
        print(f"160 turns over 10: {growth(target, conversations):.1f} times")


if __name__ == "__main__":
    main()
