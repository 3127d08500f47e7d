"""Covering arrays: few rows, of one value for each factor, in which every pair of values of two factors comes up.

Greedy and deterministic, one row at a time, after Cohen et al.'s AETG (IEEE TSE 1997): begin with what is still open,
then give each other factor the value that closes most. Two things are added. Values can *mask* factors: where nobody
attacks, a trigger is in the configuration and never at work, so such a row shows nothing about that trigger. And pairs
that are *refused* come up in no row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import TypeAlias

Value: TypeAlias = tuple[str, str]
"""A factor and its level, such as ("eraser", "nad")."""
Combination: TypeAlias = tuple[Value, ...]
"""Values of different factors, in the factors' order."""


@dataclass(frozen=True)
class Space:
    """What there is to combine."""

    factors: Mapping[str, Sequence[str]]
    masks: Mapping[Value, frozenset[str]] = field(default_factory=dict)
    """Factors whose values are not at work in a row with this one."""
    refused: frozenset[frozenset[Value]] = frozenset()

    def targets(self, strength: int) -> list[Combination]:
        """Every combination of `strength` values of different factors that must come up."""
        found = [
            combination
            for chosen in combinations(self.factors, strength)
            for combination in product(*([(factor, level) for level in self.factors[factor]] for factor in chosen))
        ]
        return [combination for combination in found if self.allowed(combination)]

    def allowed(self, values: Sequence[Value]) -> bool:
        return not any(frozenset(pair) in self.refused for pair in combinations(values, 2))

    def shown(self, combination: Combination, row: Mapping[str, str]) -> bool:
        """Whether the row's other values leave this combination at work."""
        others = [value for value in row.items() if value not in combination]
        masked = frozenset[str]().union(*(self.masks.get(value, frozenset()) for value in others))
        return masked.isdisjoint(factor for factor, _ in combination)

    def covered(self, row: Mapping[str, str], strength: int) -> set[Combination]:
        """What a row, or the beginning of one, shows."""
        values = [(factor, row[factor]) for factor in self.factors if factor in row]
        return {combination for combination in combinations(values, strength) if self.shown(combination, row)}

    def array(self, strength: int = 2) -> list[dict[str, str]]:
        """Rows that show every target."""
        todo = dict.fromkeys(self.targets(strength))
        needs = Counter(value for combination in todo for value in combination)
        rows = []
        while todo:
            hungriest = max(needs, key=lambda value: needs[value])
            mine = [combination for combination in todo if hungriest in combination]
            start = max(mine, key=lambda combination: sum(needs[value] for value in combination))
            row = self._row(start, todo, needs)
            for combination in self.covered(row, strength) & todo.keys():
                del todo[combination]
                needs.subtract(combination)
            assert start not in todo, f"{start} comes up in no row"
            rows.append(row)
        return rows

    def _row(self, start: Combination, todo: Mapping[Combination, None], needs: Mapping[Value, int]) -> dict[str, str]:
        """`start`, completed by the values that show most of what is to do."""
        row, strength = dict(start), len(start)
        for factor in sorted(self.factors, key=lambda name: -len(self.factors[name])):
            if factor in row:
                continue
            fits = [
                level
                for level in self.factors[factor]
                if self.allowed([*row.items(), (factor, level)]) and self.shown(start, {**row, factor: level})
            ]
            assert fits, f"no {factor} goes with {row}"
            before = sum(combination in todo for combination in self.covered(row, strength))

            def gain(level: str, factor: str = factor, before: int = before) -> tuple[int, int]:
                longer, value = {**row, factor: level}, (factor, level)
                if value in self.masks:  # which may hide what the row has shown so far
                    more = sum(combination in todo for combination in self.covered(longer, strength)) - before
                else:
                    fresh = [c for c in self._with(value, row, strength) if c in todo]
                    more = sum(self.shown(combination, longer) for combination in fresh)
                return more, needs[value]

            row[factor] = max(fits, key=gain)
        return {factor: row[factor] for factor in self.factors}

    def _with(self, value: Value, row: Mapping[str, str], strength: int) -> list[Combination]:
        """The combinations that a value makes with those of a row."""
        order = list(self.factors).index
        return [
            tuple(sorted((value, *others), key=lambda each: order(each[0])))
            for others in combinations(row.items(), strength - 1)
        ]
