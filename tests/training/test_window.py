"""What is asked for next and what goes: the order of need, within the room there is."""

from __future__ import annotations

import random

import pytest
import torch

from speculators.training.window import RowWindow

HERE = {"states": torch.zeros(1)}


def window(batches: list[list[int]], room: int, ahead: int = 100) -> RowWindow:
    made = RowWindow(dict.fromkeys(range(100), 1), room, ahead)
    made.expect(batches)
    return made


def asked(window: RowWindow, elsewhere: tuple[int, ...] = ()) -> list[int]:
    """All that is asked for now; it arrives at once."""
    rows = []
    while (row := window.next_request(elsewhere)) is not None:
        rows.append(row)
        window.arrived(row, HERE)
    return rows


def take(window: RowWindow, *rows: int) -> None:
    window.awaited = rows
    assert all(window.rows.get(row) is not None for row in rows)
    window.used()


def test_rows_are_asked_for_in_the_order_of_need_as_far_as_there_is_room() -> None:
    made = window([[4, 2], [7], [1, 3]], room=4)
    assert asked(made) == [4, 2, 7, 1]
    take(made, 4, 2)
    assert asked(made) == [3]


def test_a_row_that_is_wanted_again_stays_and_is_not_asked_for_twice() -> None:
    made = window([[1, 2], [3], [2, 1]], room=3)
    assert asked(made) == [1, 2, 3]
    take(made, 1, 2)
    take(made, 3)
    assert asked(made) == []
    take(made, 2, 1)
    assert made.bytes == 0


def test_no_more_batches_ahead_are_asked_for_than_are_wanted() -> None:
    made = window([[1, 2], [3], [4]], room=9, ahead=2)
    assert asked(made) == [1, 2, 3]
    take(made, 1, 2)
    assert asked(made) == [4]


def test_room_that_looking_ahead_leaves_saves_asking_again() -> None:
    batches = [[row] for _ in range(4) for row in range(10)]
    made, count = window(batches, room=7, ahead=2), 0
    for (row,) in batches:
        count += len(asked(made))
        take(made, row)
    assert count <= 10 + 3 * (10 - 7 + 2), "all at first, then only what had no room beside those that come next"


def test_the_row_that_is_wanted_last_makes_room_for_one_that_is_wanted_before_it() -> None:
    made = window([[1], [2], [3], [2], [4], [1]], room=2)
    assert asked(made) == [1, 2]
    take(made, 1)
    assert asked(made) == [3], "row 1, which is wanted last, went"
    assert set(made.rows) == {2, 3}
    take(made, 2)
    assert asked(made) == [], "row 2 is wanted before row 4"
    take(made, 3)
    assert asked(made) == [4]


def test_nothing_goes_where_it_would_not_make_enough_room() -> None:
    made = RowWindow({1: 1, 2: 1, 3: 3}, capacity=3, prefetch_batches=100)
    made.expect([[1], [2], [1], [3], [2]])
    assert asked(made) == [1, 2]
    take(made, 1)
    assert asked(made) == [], "without row 2 there would still be too little room for row 3"
    assert set(made.rows) == {1, 2}


def test_a_row_that_is_waited_for_gets_in_and_does_not_go() -> None:
    made = window([[1, 2, 3], [4]], room=2)
    assert asked(made) == [1, 2]
    made.awaited = (1, 2, 3)
    assert asked(made) == [3]
    take(made, 1, 2, 3)
    assert asked(made) == [4]


def test_rows_that_nobody_expected_are_there_when_they_are_waited_for_and_gone_afterwards() -> None:
    made = window([[1]], room=1)
    assert asked(made) == [1]
    made.awaited = (8, 9)
    assert asked(made) == [8, 9]
    take(made, 8, 9)
    assert set(made.rows) == {1}
    take(made, 1)


def test_what_lies_elsewhere_is_not_asked_for_and_takes_no_room() -> None:
    made = window([[1, 2, 3]], room=1)
    assert asked(made, elsewhere=(1, 2)) == [3]
    made = window([[1], [2]], room=1)
    assert made.next_request(()) == 1
    made.arrived(1, None)
    assert made.next_request((1,)) == 2


def test_what_is_expected_anew_keeps_what_is_here_and_lets_go_what_nobody_wants() -> None:
    made = window([[1], [2], [3]], room=3)
    asked(made)
    flying = window([[5]], room=1)
    assert flying.next_request(()) == 5
    flying.expect([])
    flying.arrived(5, HERE)
    assert (flying.rows, flying.bytes) == ({}, 0)
    made.expect([[3], [9]])
    assert set(made.rows) == {3}
    assert asked(made) == [9]


@pytest.mark.parametrize("seed", range(20))
def test_every_batch_comes_and_the_room_is_kept_to(seed: int) -> None:
    draw = random.Random(seed)
    sizes = {row: draw.randint(1, 9) for row in range(12)}
    batches = [draw.sample(range(12), draw.randint(1, 4)) for _ in range(60)]
    room, largest = draw.randint(1, 40), max(sum(sizes[row] for row in batch) for batch in batches)
    made = RowWindow(sizes, room, draw.randint(1, 5))
    made.expect(batches)
    flying: list[int] = []
    for batch in batches:
        made.awaited = batch
        while not all(made.rows.get(row) is not None for row in batch):
            while len(flying) < 3 and (row := made.next_request(())) is not None:
                flying.append(row)
            made.arrived(flying.pop(draw.randrange(len(flying))), HERE)
        made.used()
        assert made.bytes == sum(sizes[row] for row in made.rows)
    assert made.peak <= room + largest
    assert not [row for row, states in made.rows.items() if states is not None]
