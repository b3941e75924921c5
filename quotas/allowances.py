"""How much each may ask for: the user's own limits, else the role's, else everybody's.

Counts nothing; limits.py does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Protocol

MOST_COUNT = 1 << 20  # of streams and of requests
MOST_TOKENS = (1 << 53) - 1  # what every JSON reader, and Redis's Lua, can hold


@dataclass(frozen=True, slots=True)
class Allowance:
    """streams: generations open at once; rpm: requests in any minute; tokens_per_day: 0 is no limit."""

    streams: int
    rpm: int
    tokens_per_day: int


class Own(Protocol):
    """Somebody's own limits; None is what the role has."""

    @property
    def streams(self) -> int | None: ...
    @property
    def rpm(self) -> int | None: ...
    @property
    def tokens_per_day(self) -> int | None: ...


class Allowances:
    """Who gets what. by_role: `ROLE.LIMIT=NUMBER`, as settings.py has checked; the last word on one limit counts."""

    def __init__(self, everybody: Allowance, by_role: Iterable[str] = ()) -> None:
        self._everybody = everybody
        self._roles: dict[str, dict[str, int]] = {}
        for rule in by_role:
            (role, limit), number = rule.partition("=")[0].split("."), rule.partition("=")[2]
            self._roles.setdefault(role, {})[limit] = int(number)

    def of(self, role: str, own: Own) -> Allowance:
        mine = {each.name: getattr(own, each.name) for each in fields(Allowance)}
        known = {name: number for name, number in mine.items() if number is not None}
        return replace(self._everybody, **{**self._roles.get(role, {}), **known})
