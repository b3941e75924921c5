"""The table of promises is current, and none is without a proof."""

from __future__ import annotations

import pytest

from tests.promises import LATER, PROMISES, TABLE, proofs, table


def test_the_committed_table_is_current() -> None:
    assert TABLE.read_text() == table(), "run: make promises"


@pytest.mark.parametrize("number", PROMISES)
def test_every_promise_is_proved_by_a_test_or_said_to_come_later(number: str) -> None:
    assert bool([proof for proof in proofs() if proof.promise == number]) != (number in LATER)
