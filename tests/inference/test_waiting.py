"""Whose turn it is."""

from __future__ import annotations

from collections import Counter

from llamakit.inference.waiting import FairQueue


def order(queue: FairQueue[int], **running: int) -> list[int]:
    return [item for _, item in queue.in_order(Counter(running))]


def test_users_take_turns_and_each_is_served_in_order() -> None:
    queue: FairQueue[int] = FairQueue()
    for item in (1, 2, 3):
        queue.add("a", item)
    queue.add("b", 10)
    queue.add("c", 20)
    assert order(queue) == [1, 10, 20, 2, 3]
    assert order(queue, a=1) == [10, 20, 1, 2, 3]
    assert order(queue, a=1, b=2) == [20, 1, 2, 10, 3]


def test_who_had_a_turn_stands_behind() -> None:
    queue: FairQueue[int] = FairQueue()
    for user, item in (("a", 1), ("a", 2), ("b", 10)):
        queue.add(user, item)
    assert queue.remove("a", 1) and not queue.remove("a", 1) and not queue.remove("z", 1)
    assert order(queue) == [10, 2] and len(queue) == 2 and set(queue) == {2, 10}
    assert queue.remove("b", 10) and queue.remove("a", 2) and not len(queue)
