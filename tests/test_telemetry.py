"""Log lines for people and for machines, and the metrics that every Prometheus client brings."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from telemetry import Metrics, configure_logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    configure_logging()


def logged(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging()
    try:
        raise ValueError("Bearer abc.def is refused")
    except ValueError:
        logging.getLogger("library").warning("slow: %d s", 3, exc_info=True)
    return stream.getvalue()


def test_elsewhere_a_line_is_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = logged(monkeypatch, io.StringIO()).splitlines()
    told = json.loads(line)
    assert (told["event"], told["level"]) == ("slow: 3 s", "warning") and "Traceback" in told["exception"]


def test_on_a_terminal_a_line_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    text = logged(monkeypatch, Terminal())
    assert "slow: 3 s" in text.splitlines()[0] and "warning" in text.splitlines()[0] and "{" not in text
    assert "Traceback" in text


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_neither_holds_a_token(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]) -> None:
    text = logged(monkeypatch, stream())
    assert "abc.def" not in text and "[masked]" in text


def test_metrics_tell_of_the_process() -> None:
    value = Metrics().registry.get_sample_value("process_resident_memory_bytes")
    assert value and value > 1 << 20
