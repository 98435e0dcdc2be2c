"""Random access to the lines of a JSON-lines file, of which only the offsets are in memory."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any


class JsonLines:
    """The complete lines of a file, by number from 0."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._offsets = array("Q")
        end = 0
        for line in self._file:
            if line.endswith(b"\n"):
                self._offsets.append(end)
            end += len(line)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> Any:
        self._file.seek(self._offsets[number])
        return json.loads(self._file.readline())

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))
