"""kill -9 while the real model streams: every answer that began is on record."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.api.crashing import Remains
from tests.api.server import Server, eventually
from tests.stack.conftest import PASSWORD, SMALL


@pytest.mark.timeout(240)  # the model is loaded three times
@pytest.mark.promise("P12", injected="kill -9 in the middle of the real model's answer, 3 times")
def test_what_the_model_said_is_on_record_after_a_kill(
    data_dir: Path, tmp_path: Path, counted: Callable[..., None]
) -> None:
    heard: list[str] = []
    settings = {name: value for name, value in SMALL.items() if name != "ADMIN_PASSWORD"}
    for _ in range(3):
        with Server(tmp_path, PASSWORD, "app:create_app()", **settings) as server:  # which is left by kill -9
            body = {"prompt": "Tell a long story.", "max_new_tokens": 400}
            with closing(server.connect("POST", "/stream", body)) as connection:
                answer = connection.getresponse()
                while b'"text"' not in answer.readline():
                    assert not answer.isclosed()
                heard.append(answer.headers["X-Request-Id"])
    left = eventually(lambda: Remains(data_dir).complete)  # a large process takes a moment to be gone
    outcomes = [left.outcomes[left.starts[id]] for id in heard]
    counted(streams=len(heard), closed_as_aborted=outcomes.count("aborted"), problems=len(left.report.problems))
    assert outcomes == ["aborted"] * 3 and len(set(heard)) == 3
    assert left.report.problems == []
