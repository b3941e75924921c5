"""Medians, spread and ratios as they are shown, and the places in the documents that `make bench` replaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import goals, table


def test_a_median_shows_how_far_the_rounds_lie_apart() -> None:
    assert table.median([90, 100, 120]) == "100.0 ±15 %"
    assert table.median([41.26], ".1f") == "41.3"
    assert table.median([]) == table.NONE


def test_a_ratio_is_taken_round_by_round_so_that_drift_cancels_out() -> None:
    slow, fast = [100, 50], [50, 25]
    assert table.ratio(slow, fast) == "2.00 ±0 %"
    assert table.ratio(slow, []) == table.NONE
    assert table.ratios([4, 6, 8], [2, 0]) == [2]


def test_a_table_is_markdown() -> None:
    assert table.markdown(["", "a"], [["x", "1"]]) == "|  | a |\n| --- | --- |\n| x | 1 |"


def test_only_what_lies_between_the_markers_is_replaced(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    for _ in range(2):
        table.replace_block(readme, "new\n\n")
    assert readme.read_text() == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"


def test_a_file_without_the_markers_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("text")
    with pytest.raises(ValueError, match="lacks the lines"):
        table.replace_block(readme, "new")
    assert readme.read_text() == "text"


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_the_documents_have_the_markers(name: str) -> None:
    text = (Path(__file__).parents[2] / name).read_text()
    assert text.count(table.BEGIN) == text.count(table.END) == 1


def test_readme_shows_ten_of_the_goals() -> None:
    shown, every = goals.shown({}, goals.HEADLINES), goals.shown({})
    assert [line.split(" | ")[0][2:] for line in shown.splitlines()[2:]] == list(goals.HEADLINES)
    assert set(shown.splitlines()) < set(every.splitlines()) and len(goals.HEADLINES) == 10
