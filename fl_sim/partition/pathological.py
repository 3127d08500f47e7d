"""Pathological label skew: each client holds a fixed number of classes.

As "#C = k" in Li, Diao, Chen & He, ICDE 2022: k classes a client, each class divided evenly between those who hold it.
There the first class of a client is its number and the others are drawn at random, so that a class may have many
holders and another few; here classes are dealt like cards from shuffled decks, so that the numbers of their holders
differ by one at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_sim.errors import require
from fl_sim.partition.owners import check_enough, check_least, shares_of
from fl_sim.protocols import Indices


def deal(classes: int, clients: int, each: int, rng: np.random.Generator) -> list[list[int]]:
    """Hands of `each` different classes; every class is dealt once before one is dealt a second time."""
    deck: list[int] = []
    hands = []
    for _ in range(clients):
        hand: list[int] = []
        while len(hand) < each:
            deck = deck or rng.permutation(classes).tolist()
            # In a fresh deck there may be cards that the hand got from the last one: they wait for the next client.
            at = next(at for at, card in enumerate(deck) if card not in hand)
            hand.append(deck.pop(at))
        hands.append(hand)
    return hands


@dataclass(frozen=True)
class Pathological:
    """Each client has samples of `classes_per_client` classes, each divided evenly between the clients that hold it.

    A client that ends with fewer than `min_samples` takes samples of its classes from their largest holders.
    """

    classes_per_client: int = 2
    min_samples: int = 2

    def __post_init__(self) -> None:
        require(self.classes_per_client >= 1, "classes_per_client", self.classes_per_client, "must be 1 or more")
        check_least(self.min_samples)

    def check(self, samples: int, clients: int) -> None:
        check_enough(self.min_samples, samples, clients)

    def split(self, labels: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        each, (classes, label) = self.classes_per_client, np.unique(labels, return_inverse=True)
        least = -(-len(classes) // clients)
        allowed = f"{clients} clients must hold all {len(classes)} classes: from {least} to {len(classes)} each"
        require(least <= each <= len(classes), "classes_per_client", each, allowed)
        hands = deal(len(classes), clients, each, rng)
        owner = np.empty(len(labels), dtype=np.int64)
        for number in range(len(classes)):
            holders = rng.permutation([client for client, hand in enumerate(hands) if number in hand])
            members = rng.permutation(np.flatnonzero(label == number))
            for client, part in zip(holders, np.array_split(members, len(holders)), strict=True):
                owner[part] = client
        self._fill_up(owner, label, hands, rng)
        return shares_of(owner, clients)

    def _fill_up(self, owner: Indices, label: Indices, hands: list[list[int]], rng: np.random.Generator) -> None:
        sizes = np.bincount(owner, minlength=len(hands))
        for client in np.flatnonzero(sizes < self.min_samples):
            while sizes[client] < self.min_samples:
                # A sample of its classes, from the largest client that can spare one.
                offered = np.flatnonzero(np.isin(label, hands[client]) & (sizes[owner] > self.min_samples))
                rare = f"the classes of client {client} are too rare: must be {sizes[client]} or less"
                require(bool(len(offered)), "min_samples", self.min_samples, rare)
                wealth = sizes[owner[offered]]
                moved = rng.choice(offered[wealth == wealth.max()])
                sizes[owner[moved]] -= 1
                sizes[client] += 1
                owner[moved] = client
