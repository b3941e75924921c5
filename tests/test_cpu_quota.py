"""A container's CPU quota counts as cores."""

from __future__ import annotations

from pathlib import Path

import pytest

import settings
from settings import Settings, cpu_quota


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"system.slice/llm/cpu.max": "400000 100000\n", "cpu.max": "max 100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_a_quota_is_read_from_either_version(tmp_path: Path, files: dict[str, str], cores: float) -> None:
    (tmp_path / "own").write_text("0::/system.slice/llm\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path, tmp_path / "own") == cores


def test_the_model_gets_no_more_threads_than_the_quota_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.os, "sched_getaffinity", lambda _: set(range(8)))
    for quota, threads in ((float("inf"), 8), (2.5, 2), (0.5, 1)):
        monkeypatch.setattr(settings, "cpu_quota", lambda quota=quota: quota)
        assert Settings().compute_threads == threads
    assert Settings(threads=5).compute_threads == 5
