"""Which slot a request gets, and what it may reuse."""

import pytest

from model.engine.sequence import SlotTable


def test_slots_run_out_and_come_back() -> None:
    table = SlotTable(2)
    first, second = table.allocate("a", [1, 2]), table.allocate("a", [1, 2])
    assert first is not second
    with pytest.raises(ValueError):
        table.allocate("b", [3])
    table.free(first, keep=True)
    assert table.allocate("b", [3]) is first


def test_the_same_owners_next_turn_starts_from_what_is_there() -> None:
    table = SlotTable(3)
    slot = table.allocate("a", [1, 2, 3])
    slot.tokens += [1, 2, 3, 4]
    table.free(slot, keep=True)
    again = table.allocate("a", [1, 2, 3, 9, 9])
    assert again is slot and again.tokens == [1, 2, 3]


def test_at_least_the_last_prompt_token_is_computed_again() -> None:
    table = SlotTable(1)
    slot = table.allocate("a", [1, 2, 3])
    slot.tokens += [1, 2, 3, 4, 5]
    table.free(slot, keep=True)
    again = table.allocate("a", [1, 2, 3])
    assert again.tokens == [1, 2]


def test_nothing_is_shared_between_owners() -> None:
    table = SlotTable(1)
    slot = table.allocate("a", [1, 2, 3])
    slot.tokens += [1, 2, 3]
    table.free(slot, keep=True)
    other = table.allocate("b", [1, 2, 3, 4])
    assert other.tokens == []


def test_spoiled_kv_is_never_reused() -> None:
    table = SlotTable(1)
    slot = table.allocate("a", [1, 2, 3])
    slot.tokens += [1, 2, 3]
    table.free(slot, keep=False)
    again = table.allocate("a", [1, 2, 3, 4])
    assert again.tokens == []


def test_the_least_recently_used_slot_gives_way() -> None:
    table = SlotTable(3)
    slots = [table.allocate(name, [1]) for name in "abc"]
    for slot in (slots[1], slots[2], slots[0]):
        table.free(slot, keep=True)
    assert table.allocate("d", [1]) is slots[0]
    assert table.allocate("d", [1]) is slots[1]


def test_swapping_closes_the_hole_in_front() -> None:
    table = SlotTable(3)
    slots = [table.allocate("a", [1]) for _ in range(3)]
    assert [*table.compact()] == []
    table.free(slots[0], keep=True)
    assert [*table.compact()] == [(slots[2], slots[0])]
    assert (slots[2].index, slots[0].index) == (0, 2) and table.slots[0] is slots[2]
    assert [*table.compact()] == []
