"""Tokens per second that training reads its batches with: our shards beside a file a sample, on the same states.

    python tests/benchmarks/loading.py                         # 400 rows of about 300 tokens, 4 x 576
    python tests/benchmarks/loading.py --rows 2000 --width 4096 --directory /on/that/disk
    python tests/benchmarks/loading.py --table TOKENS          # rows, turns and answers of that token table

Random rows are trained on everywhere. Those of a table, which `tokenize` has made, are trained on where it says so, and
that is what is counted then: tokens that are trained on. Upstream has a sample for each turn, which is the conversation
up to there; ours is the whole conversation, with the last layer's states where a training asks for them.

The same rows in random batches of about 4096 tokens, in these ways:

    upstream   one safetensors file a row, read as the package speculators 0.9 reads it, which the others are compared
               with: `load_file`, rows of a `datasets` table, ids compared, layers flattened, everything copied into
               zeroed memory. Its own `ArrowDataset` and `CollateFn` took as long, or a little longer.
    files      the least that a reader of such files can do: ids and masks lie in memory, states are joined
    float8     the least with upstream's float8 files, a scale a token, decoded as it does
    shards     ours: `DataLoader.pack` out of an artifact's shards, which reads the next batch while this one is used
    past       the same past the page cache, as training reads what is larger than memory; every epoch is a cold one
    shards 8   the same in float8, decoded on the CPU
    encoded 8  the same as far as the CPU has to go where there is a GPU, which decodes

The bound, which `--bound` measures. A token has L * H * 2 bytes in bfloat16 (here 4608), half of that in float8. Each
byte has to be copied once out of the page cache, so warm the bound is the speed at which cores copy, 6 to 12 GB/s for
one here, as other work allows, 1.3 to 2.6 million tokens/s; several readers use several, where they have nothing else
to do. `files` copies into fresh memory, whose pages are zeroed when they are touched first, copies twice, and opens and
maps every file. Float8 adds passes over the decoded values, 7 ms a batch here. Cold the bound is the disk: through the
page cache 0.5 to 1.6 GB/s here, past it 2 to 3 GB/s. States of which a token is whole sectors (`--width 512`) are read
straight into the batch then, others by way of one copy more.

Warm is every epoch but the first one. Cold means that the kernel has been told to forget the files (`posix_fadvise`),
which it does where nothing maps them and the disk is no memory itself. The median and the best of the rounds are
printed, by the clock and by the processor's time, which a busy machine changes less; the memory is what the process
has more of than before, mapped files not counted.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from speculators.data.packing import RowSlice, training_batches
from speculators.data.token_table import TokenTable, prediction_mask, save_table, write_table
from speculators.features.contract import ANSWERS, feature_contract
from speculators.features.dataloader import DataLoader, ShardSource
from speculators.features.io import FileReader, pages
from speculators.features.shards import ShardReader, ShardWriter

Batches = list[list[RowSlice]]
Rows = list[tuple[torch.Tensor, torch.Tensor]]
"""Of each row its tokens int64 [T], and where it is trained on uint8 [T]."""
Read = Callable[[Batches], None]
"""Reads all batches, one after the other."""
BATCH_TOKENS = 4096
STORED = {"shards": "bfloat16", "shards 8": "float8_e4m3fn"}


def save(root: Path, name: str, rows: Rows) -> None:
    """Write a token table."""
    table = [
        {"input_ids": i.tolist(), "loss_mask": m.tolist(), "seq_len": len(i), "id": f"{row}", "source": "random"}
        for row, (i, m) in enumerate(rows)
    ]
    write_table(table, root / f"{name}.arrow")
    save_table(root / f"{name}.arrow", root / name)


def turns(mask: torch.Tensor) -> list[tuple[int, int]]:
    """(first token, end) of each stretch that is trained on."""
    edges = torch.diff(mask.bool().int(), prepend=torch.zeros(1), append=torch.zeros(1))
    return list(zip(edges.eq(1).nonzero()[:, 0].tolist(), edges.eq(-1).nonzero()[:, 0].tolist(), strict=True))


def by_turn(rows: Rows) -> Rows:
    """A sample for each turn: the row up to its end, of which only the turn is trained on."""
    found = []
    for ids, mask in rows:
        for begin, end in turns(mask):
            of_turn = torch.zeros(end, dtype=mask.dtype)
            of_turn[begin:] = 1
            found.append((ids[:end], of_turn))
    return found


def write(root: Path, rows: Rows, layers: int, width: int) -> None:
    """Two token tables, and the states of their rows twice each."""
    save(root, "tokens", rows)
    save(root, "turns", by_turn(rows))
    writers = {}
    for name, stored in STORED.items():
        contract = feature_contract(
            target="t",
            tokens="k",
            dtype=stored,
            compute_dtype="bfloat16",
            layer_ids=[*range(layers)],
            hidden_size=width,
            last_state=ANSWERS,
        )
        writers[name] = ShardWriter(root / name, contract, 32768)
    for name in ("files", "float8"):
        (root / name).mkdir()
    sample = 0
    for row, (its, mask) in enumerate(rows):
        states = torch.randn(len(its), layers, width).to(torch.bfloat16)
        scales = states.float().abs().amax((1, 2), keepdim=True) / 448
        small = (states.float() / scales).to(torch.float8_e4m3fn)
        for _, end in turns(mask):
            place = f"hs_{sample}.safetensors"
            own = {"token_ids": its[:end]}
            save_file({**own, "hidden_states": states[:end]}, root / "files" / place)
            coded = {"hidden_states": small[:end], "hidden_states_scales": scales[:end]}
            save_file({**own, **coded}, root / "float8" / place)
            sample += 1
        for writer in writers.values():
            writer.add(row, its, states, torch.from_numpy(prediction_mask(mask)))
    for writer in writers.values():
        writer.close()
    os.sync()


def files(root: Path, name: str, dtype: torch.dtype) -> Read:
    """One file a row."""
    table = TokenTable(root / "turns")
    ids = [torch.tensor(table.token_ids(row)) for row in range(len(table))]
    masks = [torch.tensor(table.loss_mask(row)) != 0 for row in range(len(table))]

    def read(batches: Batches) -> None:
        for batch in batches:
            found = [load_file(root / name / f"hs_{piece.row}.safetensors") for piece in batch]
            assert all(torch.equal(its["token_ids"], ids[p.row]) for p, its in zip(batch, found, strict=True))
            states = [its["hidden_states"] for its in found]
            if name == "float8":
                scales = [its["hidden_states_scales"].to(torch.bfloat16) for its in found]
                states = [its.to(torch.bfloat16) * scale for its, scale in zip(states, scales, strict=True)]
            torch.cat([ids[piece.row] for piece in batch])
            torch.cat([masks[piece.row] for piece in batch])
            torch.cat(states).to(dtype)

    return read


def upstream(root: Path, name: str, dtype: torch.dtype) -> Read:
    """One file a row, and what upstream does with it."""
    table: Any = datasets.load_from_disk(str(root / "turns")).with_format("torch")

    def row_of(piece: RowSlice) -> dict[str, torch.Tensor]:
        found = load_file(root / name / f"hs_{piece.row}.safetensors")
        assert torch.equal(found["token_ids"], table[piece.row]["input_ids"])
        states, tokens = found["hidden_states"], len(found["token_ids"])
        return {
            "hidden_states": states[:, :-1].flatten(1),
            "last": states[:, -1],
            "input_ids": found["token_ids"],
            "loss_mask": table[piece.row]["loss_mask"],
            "position_ids": torch.arange(tokens),
        }

    def read(batches: Batches) -> None:
        for batch in batches:
            found = [row_of(piece) for piece in batch]
            total = sum(piece.end for piece in batch)
            for key, first in found[0].items():
                joined = torch.zeros(total, *first.shape[1:], dtype=dtype if first.is_floating_point() else first.dtype)
                begin = 0
                for its in found:
                    joined[begin : begin + len(its[key])] = its[key]
                    begin += len(its[key])

    return read


def shards(root: Path, name: str, dtype: torch.dtype) -> Read:
    """Ours."""
    corpus = DataLoader(root / "tokens", ShardSource(ShardReader(root / name)))

    def read(batches: Batches) -> None:
        corpus.expect(batches)
        for batch in batches:
            corpus.pack(batch, torch.device("cpu")).hidden_states.to(dtype)

    return read


def past(root: Path, name: str, dtype: torch.dtype) -> Read:
    """Ours, as it reads what no page cache would hold."""
    corpus = DataLoader(root / "tokens", ShardSource(ShardReader(root / name, direct_io=True)))

    def read(batches: Batches) -> None:
        corpus.expect(batches)
        for batch in batches:
            corpus.pack(batch, torch.device("cpu")).hidden_states.to(dtype)

    return read


def encoded(root: Path, name: str, dtype: torch.dtype) -> Read:
    """Ours, not decoded."""
    corpus = DataLoader(root / "tokens", ShardSource(ShardReader(root / name)))

    def read(batches: Batches) -> None:
        corpus.expect(batches)
        for batch in batches:
            corpus.read(batch)

    return read


WAYS = {
    "upstream": upstream, "files": files, "float8": files, "shards": shards, "past": past,
    "shards 8": shards, "encoded 8": encoded,
}  # fmt: skip
PLACES = {"upstream": "files", "past": "shards", "encoded 8": "shards 8"}
"""Where a way reads, if not in the directory of its name."""


def once(read: Read, batches: Batches) -> tuple[float, float]:
    """Seconds and CPU seconds for every row once."""
    began, used = time.perf_counter(), time.process_time()
    read(batches)
    return time.perf_counter() - began, time.process_time() - used


def bound() -> float:
    """GB/s that one core copies with, at best, between two places that it has touched before."""
    source, place = torch.zeros(1 << 26, dtype=torch.uint8), torch.zeros(1 << 26, dtype=torch.uint8)
    best = 1e9
    for _ in range(10):
        began = time.perf_counter()
        place.copy_(source)
        best = min(best, time.perf_counter() - began)
    return (1 << 26) / best / 1e9


def disk(directory: Path) -> float:
    """GB/s at which a set's files are read past the page cache, one after the other, at best."""
    reading, best = FileReader(direct_io=True), 0.0
    files = [
        (path, path.stat().st_size // FileReader.PAGE * FileReader.PAGE) for path in sorted(directory.glob("shard-*"))
    ]
    room = pages(max(size for _, size in files))
    for _ in range(5):
        began = time.perf_counter()
        for path, size in files:
            reading.read([(path, 0, room[:size])])
        best = max(best, sum(size for _, size in files) / (time.perf_counter() - began) / 1e9)
    return best


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
    """Print a line a way and temperature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=300, help="mean length of a row")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--table", type=Path, default=None, help="rows of this token table instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", help="what the batch is wanted in")
    parser.add_argument("--bound", action="store_true", help="measure copying too")
    parser.add_argument("--directory", type=Path, default=None, help="where the files are written and deleted again")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as a loader beside a trainer has it; and threads that wait for each other count as busy
    torch.manual_seed(0)
    if options.bound:
        print(f"copying: {bound():.1f} GB/s")
    if options.table is None:
        draw = random.Random(0)
        lengths = [draw.randint(options.tokens // 2, options.tokens * 3 // 2) for _ in range(options.rows)]
        rows = [(torch.randint(0, 50000, (n,)), torch.ones(n, dtype=torch.uint8)) for n in lengths]
    else:
        table = TokenTable(options.table)
        every = range(min(options.rows, len(table)))
        rows = [(torch.tensor(table.token_ids(r)), torch.tensor(table.loss_mask(r), dtype=torch.uint8)) for r in every]
    dtype, total = getattr(torch, options.dtype), sum(int(mask.sum()) for _, mask in rows)
    pieces = {
        kind: [RowSlice(row, 0, len(ids)) for row, (ids, _) in enumerate(of)]
        for kind, of in (("turns", by_turn(rows)), ("tokens", rows))
    }
    with tempfile.TemporaryDirectory(dir=options.directory) as made:
        root = Path(made)
        write(root, rows, options.layers, options.width)
        if options.bound:
            print(f"the disk: {disk(root / 'shards'):.1f} GB/s")
        opened = {name: way(root, PLACES.get(name, name), dtype) for name, way in WAYS.items()}
        memory: dict[str, float] = {}
        for kind in ("cold", "warm"):
            walls: dict[str, list[float]] = {name: [] for name in WAYS}
            cores: dict[str, list[float]] = {name: [] for name in WAYS}
            for number in range(1 + options.rounds):
                for name in WAYS:  # side by side, so that a busy machine hits all of them
                    before = own_mib()
                    if kind == "cold":
                        forget(root / PLACES.get(name, name))
                    own = pieces["turns" if WAYS[name] in (files, upstream) else "tokens"]
                    seconds, core = once(opened[name], training_batches(own, BATCH_TOKENS, number, 0))
                    if not number:  # which also finds memory for its batches
                        memory[name] = max(memory.get(name, 0.0), own_mib() - before)
                    else:
                        walls[name].append(total / seconds)
                        cores[name].append(total / core)
            for name in WAYS:
                if kind == "cold":
                    size = sum(path.stat().st_size for path in (root / PLACES.get(name, name)).iterdir())
                    print(f"{name:9} {size / total:6.0f} bytes a token that is trained on")
                wall, core_speed = said(walls, name), said(cores, name)
                print(f"{kind} {name:9} {wall} tokens/s; {core_speed} a CPU second; {memory[name]:.0f} MiB")


def said(speeds: dict[str, Sequence[float]], name: str) -> str:
    """The median and the best, and how many times those of upstream they are."""
    median, best = statistics.median(speeds[name]), max(speeds[name])
    ratio, best_ratio = median / statistics.median(speeds["upstream"]), best / max(speeds["upstream"])
    return f"{median:8.0f} ({ratio:4.2f}x; best {best:.0f}, {best_ratio:.2f}x)"


if __name__ == "__main__":
    main()
