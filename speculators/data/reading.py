"""Reads the rows of a data file, one by one, whatever it is: JSON, CSV, Parquet, Arrow; plain, gzip or zstd.

What a file is follows from its content, not from its name. A file is never loaded at once. A row that cannot be read is
skipped, where the next one can be found; what is lost beyond that is a `DamageError`, after all that could be read.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speculators.data.csv_rows import csv_rows, delimiter_of
from speculators.data.damage import ByteCounts, CutError, DamageError
from speculators.data.json_rows import is_beginning, line_rows, value_rows
from speculators.errors import SourceError

_BLOCK = 1 << 20
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_ARROW_FILE, _ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"
_BOM = b"\xef\xbb\xbf"
_FOREIGN = {
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"%PDF": "PDF",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"SQLite format 3": "an SQLite database",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
    b"\x93NUMPY": "a NumPy array",
    b"version https://git-lfs": "a pointer of Git LFS, not the file",
}
"""First bytes of what is not read."""
_HINTS = {
    "text in UTF-16": "iconv -f UTF-16 -t UTF-8 {name} > utf8-{name}",
    "PDF": "extract the rows as JSON lines",
    "HTML or XML": "it is a page about the file: download the file itself, on the hub from /resolve/, not /blob/",
    "a zip archive": "unzip {name}, and name what is in it",
    "compressed with bzip2": "bunzip2 {name}",
    "compressed with xz": "unxz {name}",
    "a pointer of Git LFS, not the file": "git lfs pull, or name the dataset as hub:ORG/NAME",
    "empty": "download it or write it again",
}


def needs_pyarrow(path: Path) -> bool:
    """Whether pyarrow is needed to read a file."""
    with path.open("rb") as file:
        return file.read(6).startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM, _ZSTD))


def data_rows(path: Path, counts: ByteCounts) -> Iterator[Any]:
    """Read the rows of a file: JSON values, or `BrokenRow`.

    Raises:
        SourceError: the file is nothing that can be read.
        DamageError: its end, or more, is lost.
    """
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)):
        from speculators.data.tables import table_rows

        yield from table_rows(path, counts)
        return
    head, cut = _head(path)
    if cut is not None and not head:
        counts.total += path.stat().st_size
        counts.not_read += path.stat().st_size
        raise DamageError(str(cut), 0, 0, last_row_only=False)
    kind = _text_kind(head, path)
    blocks = _text_blocks(path, counts)
    if kind == "csv":
        yield from csv_rows(blocks, counts)
    elif kind == "lines":
        yield from line_rows(blocks, counts)
    else:
        yield from value_rows(blocks, counts)


def _head(path: Path) -> tuple[bytes, CutError | None]:
    """The first bytes of the content, without a byte-order mark and blanks before them; what ends it early."""
    head = b""
    try:
        for block in _file_blocks(path):
            head = (head + block).removeprefix(_BOM).lstrip()
            if len(head) > 1024:
                break
    except CutError as error:
        return head, error
    return head, None


def _text_kind(head: bytes, path: Path) -> str:
    """Tell what text is: `values` (JSON: lists, or objects over several lines), `lines` (an object each) or `csv`."""
    with path.open("rb") as file:
        start = file.read(4)
    compressed = "gzip of " if start.startswith(_GZIP) else "zstd of " if start == _ZSTD else ""
    kind = _foreign_kind(head)
    if kind:
        hint = _HINTS.get(kind, "give JSON lines, a JSON list, CSV, Parquet or Arrow")
        hint = f"unpack {path.name}" if compressed and kind not in _HINTS else hint.format(name=path.name)
        raise SourceError(f"{path.name} is {compressed}{kind}", hint)
    if head.startswith((b"[", b"{")):
        first_line = head.split(b"\n")[0].rstrip()
        is_whole = len(first_line) == len(head.rstrip()) or not is_beginning(first_line)
        return "lines" if head.startswith(b"{") and is_whole else "values"
    first = head.decode(errors="replace").splitlines()[0]
    if delimiter_of(first) is not None:
        if b"\r" in head.split(b"\n")[0].rstrip(b"\r"):
            hint = f"tr '\\r' '\\n' < {path.name} > NEW, and name that file"
            raise SourceError(f"{path.name} has lines that end in a carriage return alone", hint)
        return "csv"
    raise SourceError(
        f"{path.name} is neither JSON nor CSV nor another format that is read: it begins with {first[:40]!r}",
        'write a row a line: {"messages": [{"role": "user", "content": "..."}]} or {"prompt": "..."}',
    )


def _foreign_kind(head: bytes) -> str:
    """What content is that is not read; empty for text."""
    for start, kind in _FOREIGN.items():
        if head.startswith(start):
            return kind
    if not head:
        return "empty"
    if head.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)):
        return "Parquet" if head.startswith(_PARQUET) else "Arrow"
    if head.startswith((_GZIP, _ZSTD)):
        return "compressed again"
    if max(head[0:400:2].count(0), head[1:400:2].count(0)) * 5 > 4 * len(head[0:400:2]):
        return "text in UTF-16"
    if b"\0" in head and not head.startswith((b"[", b"{")):
        return "binary data"
    return "HTML or XML" if head.startswith(b"<") else ""


def _file_blocks(path: Path) -> Iterator[bytes]:
    """Read a file in blocks, decompressed.

    Raises:
        CutError: a compressed file ends early or is broken, after all that could be decompressed.
    """
    with path.open("rb") as file:
        start = file.read(len(_ZSTD))
        file.seek(0)
        if start.startswith(_GZIP):
            yield from _inflated(file, path.stat().st_size)
        elif start == _ZSTD:
            yield from _zstd_blocks(path)
        else:
            yield from iter(lambda: file.read(_BLOCK), b"")


def _inflated(file: Any, size: int) -> Iterator[bytes]:
    inflate, incomplete = zlib.decompressobj(wbits=31), False
    for block in iter(lambda: file.read(_BLOCK), b""):
        while block.strip(b"\0") if not incomplete else block:
            # In small steps, so that an error loses little of what precedes it.
            try:
                data = inflate.decompress(block[:4096])
            except zlib.error as error:
                lost = size - file.tell() + len(block)
                raise CutError(f"the compressed file is broken ({error})", lost) from None
            rest = block[4096:]
            if data:
                yield data
            block, incomplete = inflate.unused_data + rest, not inflate.eof
            if inflate.eof:
                inflate = zlib.decompressobj(wbits=31)
    if incomplete:
        raise CutError("the compressed file ends too early", 0)


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    import pyarrow

    size, done, reason = _BLOCK, 0, ""
    while size:
        # pyarrow drops what precedes an error in the same read: what is left is read in ever smaller blocks.
        with pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd") as stream:
            for skipped in range(0, done, _BLOCK):
                stream.read(min(_BLOCK, done - skipped))
            try:
                while block := stream.read(size):
                    done += len(block)
                    yield block
                return
            except OSError as error:
                reason, size = str(error), size // 2
    if "Truncated" in reason:
        raise CutError("the compressed file ends too early", 0)
    raise CutError(f"the compressed file is broken ({reason})", 1)


def _text_blocks(path: Path, counts: ByteCounts) -> Iterator[bytes]:
    """The content without a byte-order mark; counts its bytes. An error comes when all before it is read."""
    first = True
    for block in _file_blocks(path):
        counts.total += len(block)
        yield block.removeprefix(_BOM) if first else block
        first = False
