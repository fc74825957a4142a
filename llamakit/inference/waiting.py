"""Who waits for a slot, and who is next: the user who has the fewest, then the one who has waited longest."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """First come, first served within a user; users take turns."""

    def __init__(self) -> None:
        self._users: dict[str, deque[Item]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._users.values()))

    def __iter__(self) -> Iterator[Item]:
        for items in self._users.values():
            yield from items

    def add(self, user: str, item: Item) -> None:
        """Behind the others of this user."""
        self._users.setdefault(user, deque()).append(item)

    def remove(self, user: str, item: Item) -> bool:
        """Take it out, and put its user behind all others; False where it is not there."""
        items = self._users.get(user, deque())
        if item not in items:
            return False
        items.remove(item)
        del self._users[user]
        if items:
            self._users[user] = items
        return True

    def in_order(self, running: Counter[str]) -> Iterator[tuple[str, Item]]:
        """Every (user, item) in the order of its claim; running: how many slots each user has."""
        has, left = Counter(running), {user: deque(items) for user, items in self._users.items()}
        while left:
            user = min(left, key=lambda user: has[user])  # the first of those with the fewest
            yield user, left[user].popleft()
            has[user] += 1
            if not left[user]:
                del left[user]
