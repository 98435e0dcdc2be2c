"""What a data file loses where it cannot be read, in rows and in bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ByteCounts:
    """Bytes of the content of data files, decompressed; those that gave no row."""

    total: int = 0
    not_read: int = 0


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """In place of a row that cannot be read."""

    reason: str


class DamageError(Exception):
    """From byte `row` on, nothing can be read, because of what is at `byte`."""

    def __init__(self, reason: str, byte: int, row: int, *, last_row_only: bool) -> None:
        super().__init__(reason)
        self.byte = byte
        self.row = row
        self.last_row_only = last_row_only
        """Whether no more than one row is lost."""


class CutError(Exception):
    """A compressed file ends early, or is broken from the compressed byte `lost` bytes before its end on."""

    def __init__(self, reason: str, lost: int) -> None:
        super().__init__(reason)
        self.lost = lost


def raise_cut(cut: CutError | None, size: int, row: int, counts: ByteCounts, *, complete: bool) -> None:
    """Raise DamageError where the content ends early, or in the middle of a row."""
    if cut is not None:
        counts.not_read += cut.lost
        counts.total += cut.lost
        raise DamageError(str(cut), size, row, last_row_only=cut.lost == 0)
    if not complete:
        raise DamageError("the file ends in the middle of a row", size, row, last_row_only=True)
