"""Messages from one EST to another: in memory within an executor, through the job's key-value store between executors.

A message is buffered, so that a sender never waits. Messages of one address (group, sender, receiver, tag) are taken in
the order in which they were sent, by receives in the order in which they were posted (`Mailbox.claim`).
"""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any, NamedTuple

import torch.distributed as dist


class Address(NamedTuple):
    """Where messages go: their group, the ranks of sender and receiver in the virtual world, and a tag."""

    group: str
    sender: int
    receiver: int
    tag: int


class Mailbox:
    """The messages from and to the ESTs of one executor.

    Args:
        ranks: the ESTs hosted here.
        store: reaches the other executors; None if there are none.
    """

    def __init__(self, ranks: tuple[int, ...], store: dist.Store | None) -> None:
        self._ranks = ranks
        self._store = store
        self._run = 0
        self.clear()

    def clear(self) -> None:
        """A new run begins, on every executor: what nobody received is lost."""
        self._run += 1
        self._sent: Counter[Address] = Counter()
        self._claimed: Counter[Address] = Counter()
        self._letters: dict[tuple[Address, int], Any] = {}

    def post(self, address: Address, letter: Any) -> None:
        """Send; does not wait.

        Args:
            address: where to.
            letter: tensors in host memory, if the receiver is on another executor.
        """
        number = self._sent[address]
        self._sent[address] += 1
        if address.receiver in self._ranks:
            self._letters[address, number] = letter
        else:
            assert self._store is not None
            self._store.set(self._key(address, number), pickle.dumps(letter))  # type: ignore[arg-type]

    def claim(self, address: Address) -> int:
        """The number of the next message that nobody has claimed."""
        self._claimed[address] += 1
        return self._claimed[address] - 1

    def unclaimed(self, address: Address) -> int:
        """What `claim` would return, without claiming it."""
        return self._claimed[address]

    def has(self, address: Address, number: int) -> bool:
        """Whether a message has come."""
        if address.sender in self._ranks:
            return (address, number) in self._letters
        assert self._store is not None
        return self._store.check([self._key(address, number)])

    def take(self, address: Address, number: int) -> Any:
        """A message that has come."""
        if address.sender in self._ranks:
            return self._letters.pop((address, number))
        assert self._store is not None
        key = self._key(address, number)
        letter = pickle.loads(self._store.get(key))
        self._store.delete_key(key)
        return letter

    def _key(self, address: Address, number: int) -> str:
        return "/".join(map(str, ("easyscale", self._run, *address, number)))
