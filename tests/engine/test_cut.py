"""Batches: every task once, the largest first, none too large, and enough for all workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loratools.engine import Item
from loratools.engine._cut import cut

MiB = 1 << 20
items = st.lists(
    st.builds(
        Item, st.just("t"), read=st.integers(0, 600 * MiB), written=st.integers(0, 600 * MiB),
        cost=st.floats(0, 1e12),
    ),
    max_size=60,
)  # fmt: skip


def share(item: Item) -> float:
    """A task as a share of 256 MiB and 20 GFLOP."""
    return (item.read + item.written) / (256 * MiB) + item.cost / 2e10


@given(items, st.integers(1, 2000))
def test_every_task_is_in_one_batch_and_the_largest_batch_comes_first(
    found: list[Item], workers: int
) -> None:
    batches = cut(found, workers)
    assert sorted(number for batch in batches for number in batch) == list(range(len(found)))
    sizes = [sum(share(found[number]) for number in batch) for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    assert all(batches)


@given(items, st.integers(1, 2000))
def test_no_batch_of_several_tasks_is_larger_than_the_bound(found: list[Item], workers: int) -> None:
    bound = min(1.0, sum(map(share, found)) / (4 * workers))
    for batch in cut(found, workers):
        size = sum(share(found[number]) for number in batch)
        assert len(batch) == 1 or size <= bound * (1 + 1e-9)


@given(items, st.integers(1, 64))
def test_whoever_takes_the_next_is_never_far_behind(found: list[Item], workers: int) -> None:
    busy = [0.0] * workers
    sizes = [sum(share(found[number]) for number in batch) for batch in cut(found, workers)]
    for size in sizes:
        free = min(range(workers), key=busy.__getitem__)
        busy[free] += size
    total = sum(sizes)
    assert max(busy) <= total / workers + max(sizes, default=0.0) + 1e-9


def test_small_neighbours_go_together_and_a_large_one_goes_alone() -> None:
    found = [Item(str(number), read=16 * MiB) for number in range(64)]
    found[5] = Item("5", read=900 * MiB)
    batches = cut(found)
    assert batches[0] == (5,)
    assert all(len(batch) > 8 for batch in batches[1:-1])
    assert all(list(batch) == sorted(batch) for batch in batches)


def test_few_bytes_are_still_shared_out() -> None:
    assert len(cut([Item(str(number), read=1000) for number in range(80)], workers=2)) == 8
    assert cut([]) == []
    assert cut([Item("a"), Item("b")]) == [(0, 1)]
