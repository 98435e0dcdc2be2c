"""Tokens per second that hidden states are read with: our shards beside a file a sample, on the same states.

    python tests/benchmarks/loading.py                         # 400 rows of about 300 tokens, 4 x 576
    python tests/benchmarks/loading.py --rows 2000 --width 4096 --directory /on/that/disk

Rows come in random order, batches have about 4096 tokens. A batch is what training makes of it: the ids of each row are
compared with those of the token table, the states of all rows lie in one tensor in bfloat16. Warm is every epoch but
the first one. Cold means that the kernel has been told to forget the files (`posix_fadvise`), which it does where
nothing maps them and the disk is no memory itself. The median and the best of the rounds are printed, by the clock and
by the processor's time, which a busy machine changes less; the memory is what a batch adds to the process's own, mapped
files not counted.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from speculators.data.encoding import decode
from speculators.data.shards import ShardReader, ShardWriter, feature_contract

Read = Callable[[list[int]], tuple[list[torch.Tensor], torch.Tensor]]
"""Rows -> the ids of each, and the states of all."""
BATCH_TOKENS = 4096


def write(directory: Path, ids: list[torch.Tensor], layers: int, width: int) -> None:
    """The same rows three times: a file a sample, shards in bfloat16, shards in float8."""
    writers = {}
    for name in ("bfloat16", "float8_e4m3fn"):
        contract = feature_contract(
            target="t", tokens="k", dtype=name, compute_dtype="bfloat16", layer_ids=[*range(layers)], hidden_size=width
        )
        writers[name] = ShardWriter(directory / name, contract, 32768)
    (directory / "files").mkdir()
    for row, its in enumerate(ids):
        states = torch.randn(len(its), layers, width).to(torch.bfloat16)
        save_file({"hidden_states": states, "token_ids": its}, directory / f"files/hs_{row}.safetensors")
        for writer in writers.values():
            writer.add(row, its, states)
    for writer in writers.values():
        writer.close()
    os.sync()


def from_files(directory: Path) -> Read:
    """One file a sample, opened for every row."""

    def read(rows: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        found = [load_file(directory / f"hs_{row}.safetensors") for row in rows]
        return [its["token_ids"] for its in found], torch.cat([its["hidden_states"] for its in found])

    return read


def from_shards(directory: Path) -> Read:
    """Ours."""
    reader = ShardReader(directory)

    def read(rows: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        found = [reader.encoded(row) for row in rows]
        joined = {name: torch.cat([its[name] for its in found]) for name in found[0]}
        return [reader.token_ids(row) for row in rows], decode(joined)

    return read


def batches(order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Rows in this order, about BATCH_TOKENS of them at a time."""
    batch: list[int] = []
    for row in order:
        batch.append(row)
        if sum(lengths[r] for r in batch) >= BATCH_TOKENS:
            yield batch
            batch = []
    if batch:
        yield batch


def once(read: Read, ids: list[torch.Tensor], seed: int) -> tuple[float, float, float]:
    """Seconds and CPU seconds for every row once, and the MiB that the process has more of while it has a batch."""
    order = list(range(len(ids)))
    random.Random(seed).shuffle(order)
    before, most = own_mib(), 0.0
    began, used = time.perf_counter(), time.process_time()
    for batch in batches(order, [len(its) for its in ids]):
        found, states = read(batch)
        assert all(torch.equal(its, ids[row]) for row, its in zip(batch, found, strict=True))
        most = max(most, own_mib() - before)
        del found, states
    return time.perf_counter() - began, time.process_time() - used, most


def own_mib() -> float:
    """Memory of this process that no file backs."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def forget(directory: Path) -> None:
    """Drop a directory's files from the page cache, as far as the kernel does."""
    gc.collect()
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    """Print a line a layout and temperature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=300, help="mean length of a row")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=None, help="where the files are written and deleted again")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as a loader beside a trainer has it; and threads that wait for each other count as busy
    torch.manual_seed(0)
    draw = random.Random(0)
    lengths = [draw.randint(options.tokens // 2, options.tokens * 3 // 2) for _ in range(options.rows)]
    ids = [torch.randint(0, 50000, (length,)) for length in lengths]
    layouts = {"files": from_files, "bfloat16": from_shards, "float8_e4m3fn": from_shards}
    with tempfile.TemporaryDirectory(dir=options.directory) as made:
        root = Path(made)
        write(root, ids, options.layers, options.width)
        for kind in ("cold", "warm"):
            walls: dict[str, list[float]] = {name: [] for name in layouts}
            cores: dict[str, list[float]] = {name: [] for name in layouts}
            memory = dict.fromkeys(layouts, 0.0)
            open_ones = {name: layout(root / name) for name, layout in layouts.items()} if kind == "warm" else {}
            for read in open_ones.values():
                once(read, ids, -1)
            for number in range(options.rounds):
                for name, layout in layouts.items():  # side by side, so that a busy machine hits all of them
                    if kind == "cold":
                        forget(root / name)
                    seconds, core, mib = once(open_ones.get(name) or layout(root / name), ids, number)
                    walls[name].append(sum(lengths) / seconds)
                    cores[name].append(sum(lengths) / core)
                    memory[name] = max(memory[name], mib)
            for name in layouts:
                size = sum(path.stat().st_size for path in (root / name).iterdir()) / sum(lengths)
                print(
                    f"{kind} {name:13} {said(walls, name)} tokens/s; {said(cores, name)} a CPU second; "
                    f"{size:.0f} bytes a token, {memory[name]:.0f} MiB a batch"
                )


def said(speeds: dict[str, list[float]], name: str) -> str:
    """The median, how many times that of files it is, and the best."""
    median = statistics.median(speeds[name])
    ratio = median / statistics.median(speeds["files"])
    return f"{median:8.0f} ({ratio:4.2f}x files, best {max(speeds[name]):.0f})"


if __name__ == "__main__":
    main()
