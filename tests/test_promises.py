"""The table of promises is current, none is without a proof, and its numbers come from the tests."""

from __future__ import annotations

import pytest

from tests.promises import LATER, PROMISES, TABLE, Recorder, proofs, recorded, table


def test_the_committed_table_is_current() -> None:
    assert TABLE.read_text() == table(), "run: make promises"


@pytest.mark.parametrize("number", PROMISES)
def test_every_promise_is_proved_by_a_test_or_said_to_come_later(number: str) -> None:
    assert bool([proof for proof in proofs() if proof.promise == number]) != (number in LATER)


def test_the_table_names_every_test_with_what_it_counted() -> None:
    text, numbers = TABLE.read_text(), recorded()
    assert set(numbers) <= {proof.test for proof in proofs()}
    for proof in proofs():
        assert proof.link in text
        assert numbers.get(proof.test) or not proof.counts, f"{proof.test} has not been run: make promises"


def test_what_is_counted_comes_from_the_tests() -> None:
    assert [proof.test for proof in proofs() if not proof.counts] == [], "use the fixture counted"


def test_numbers_are_added_up_over_parameters_and_calls_and_only_of_tests_that_pass(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        from tests.promises import counted

        @pytest.mark.parametrize("lines", [1, 2])
        def test_adds(counted, lines):
            counted(lines=lines, errors=0)
            counted(lines=10)

        def test_fails(counted):
            counted(lines=5)
            assert False
        """
    )
    recorder = Recorder()
    assert pytester.inline_run("-p", "no:cacheprovider", plugins=[recorder]).ret == pytest.ExitCode.TESTS_FAILED
    assert {test.partition("::")[2]: dict(found) for test, found in recorder.numbers.items()} == {
        "test_adds": {"lines": 23, "errors": 0}
    }
