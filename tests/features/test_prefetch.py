"""The prefetcher starts items in order, up to its depth; the buffer pool reuses memory that no tensor holds."""

from __future__ import annotations

import threading

import pytest
import torch

from speculators.features.prefetch import BufferPool, Prefetcher


class Maker:
    """Makes tens of numbers, and remembers of which and where."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, item: int) -> int:
        self.made.append(item)
        self.threads.add(threading.current_thread())
        self.begun.release()
        assert self.go_on.wait(20)
        if item < 0:
            raise ValueError(f"{item} is negative")
        return 10 * item


def test_one_more_is_made_than_was_taken_and_in_order() -> None:
    maker = Maker()
    prefetcher = Prefetcher(maker)
    assert prefetcher.expect([3, 1, 2, 5]) == 0
    assert maker.made == [], "nobody has wanted anything yet"
    for count, item in enumerate([3, 1, 2, 5], start=1):
        assert prefetcher.take(item) == 10 * item
        for _ in range(2 if count == 1 else int(count < 4)):
            assert maker.begun.acquire(timeout=20)
        assert maker.made == [3, 1, 2, 5][: count + 1]
    prefetcher.stop()
    prefetcher.join()
    assert len(maker.threads) == 1
    assert not any(thread.is_alive() for thread in maker.threads)


def test_two_may_be_made_at_the_same_time_and_are_taken_in_order() -> None:
    maker, taken = Maker(), list[int]()
    prefetcher = Prefetcher(maker, 2)
    prefetcher.expect([3, 1, 2, 5])
    maker.go_on.clear()
    taker = threading.Thread(target=lambda: taken.extend(map(prefetcher.take, (3, 1, 2, 5))))
    taker.start()
    assert all(maker.begun.acquire(timeout=20) for _ in range(2))
    assert not maker.begun.acquire(timeout=0.1), "the third waits for a thread"
    maker.go_on.set()
    taker.join(20)
    prefetcher.join()
    assert taken == [30, 10, 20, 50]
    assert sorted(maker.made[:2]) == [1, 3]
    assert len(maker.threads) == 2


def test_what_goes_wrong_is_raised_when_it_is_wanted_and_not_before() -> None:
    prefetcher = Prefetcher(Maker())
    prefetcher.expect([1, -2, 3])
    assert prefetcher.take(1) == 10
    with pytest.raises(ValueError, match="-2 is negative"):
        prefetcher.take(-2)
    assert prefetcher.take(3) == 30


def test_what_was_not_expected_is_made_too_and_what_was_begun_is_kept() -> None:
    maker = Maker()
    prefetcher = Prefetcher(maker)
    prefetcher.expect([1, 2])
    assert [prefetcher.take(item) for item in (1, 7, 2)] == [10, 70, 20]
    assert maker.made == [1, 2, 7]


def test_another_order_keeps_what_still_comes_first_and_drops_what_does_not() -> None:
    maker = Maker()
    prefetcher = Prefetcher(maker)
    prefetcher.expect([1, 2, 3])
    prefetcher.take(1)
    assert prefetcher.expect([2, 5]) == 1
    assert prefetcher.take(2) == 20
    assert prefetcher.expect([4, 6]) == 0
    assert maker.made[:3] == [1, 2, 5] or maker.made == [1, 2], "it was begun or it was not"
    begun = len(maker.made)
    assert prefetcher.take(4) == 40
    assert maker.made[begun:][0] == 4


def test_it_ends_while_something_is_being_made() -> None:
    maker = Maker()
    prefetcher = Prefetcher(maker)
    prefetcher.expect([1, 2, 3])
    prefetcher.take(1)
    maker.go_on.clear()
    assert maker.begun.acquire(timeout=20)
    prefetcher.stop()
    maker.go_on.set()
    prefetcher.join()
    assert 3 not in maker.made
    assert not any(thread.is_alive() for thread in maker.threads)


def one(buffers: BufferPool, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return buffers.empty({"it": (dtype, shape)})["it"]


def test_memory_is_used_again_when_no_part_of_a_tensor_is_held_any_more() -> None:
    buffers = BufferPool()
    first = one(buffers, torch.bfloat16, 1000, 4, 300)
    assert (first.dtype, first.shape) == (torch.bfloat16, (1000, 4, 300))
    place, part = first.data_ptr(), first[7:9].flatten()
    del first
    second = one(buffers, torch.bfloat16, 1000, 4, 300)
    assert second.data_ptr() != place, "a part of the first is still held"
    del part
    third = one(buffers, torch.float8_e4m3fn, 900, 4, 500)
    assert third.data_ptr() == place, "what is smaller fits"


def test_what_belongs_together_takes_one_piece_of_memory_and_each_begins_with_a_page() -> None:
    buffers = BufferPool()
    made = buffers.empty({"a": (torch.bfloat16, (1000, 601)), "b": (torch.float32, ()), "c": (torch.uint8, (5,))})
    assert {name: (its.dtype, its.shape) for name, its in made.items()} == {
        "a": (torch.bfloat16, (1000, 601)),
        "b": (torch.float32, ()),
        "c": (torch.uint8, (5,)),
    }
    assert {its.data_ptr() % 4096 for its in made.values()} == {0}
    made["a"].fill_(1.0), made["b"].fill_(2.0), made["c"].fill_(3)
    assert [float(its.float().mean()) for its in made.values()] == [1.0, 2.0, 3.0]
    del made["a"]
    assert buffers._free == []
    del made
    assert len(buffers._free) == 1
    assert buffers.empty({"small": (torch.float32, (4, 2))})["small"].shape == (4, 2)


def test_memory_that_is_too_small_is_given_back_for_larger() -> None:
    buffers = BufferPool()
    for tokens in (1024, 2048, 4096, 3072):
        one(buffers, torch.bfloat16, tokens, 600)
    assert [len(block) for block in buffers._free] == [4096 * 600 * 2]


def test_what_autograd_has_saved_is_not_written_over() -> None:
    buffers = BufferPool()
    states = one(buffers, torch.float32, 1000, 600).fill_(2.0)
    weight = torch.ones(600, requires_grad=True)
    loss = (states * weight).sum()
    del states
    one(buffers, torch.float32, 1000, 600).fill_(5.0)
    loss.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((600,), 2000.0))
