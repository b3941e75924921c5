"""The app behind a real gunicorn with the real configuration: gone clients, hostile bytes, and stopping."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import PASSWORD
from tests.api.server import ROOT, SECONDS, Server, eventually
from tests.api.test_generate import events

SILENT = {"prompt": "silent", "cache": False}


@contextmanager
def reading(server: Server, body: object, path: str = "/stream") -> Iterator[http.client.HTTPResponse]:
    """A stream of which one line has been read; leaving hangs up."""
    with closing(server.connect("POST", path, body)) as connection, connection.getresponse() as response:
        assert response.status == 200 and response.readline()
        yield response


@pytest.mark.promise(
    "P10",
    injected="a connection closed while silent and while talking, streamed or not",
    counted="within a second",
)
@pytest.mark.parametrize("path", ["/generate", "/stream"])
@pytest.mark.parametrize("prompt", ["silent", "slow " + "and on " * 400])
def test_a_gone_client_frees_its_slot_while_nothing_or_something_is_said(
    server: Server, counted: Callable[..., None], path: str, prompt: str
) -> None:
    body = {"prompt": prompt, "max_new_tokens": 2000}
    with reading(server, body) if path == "/stream" else closing(server.connect("POST", path, body)):
        eventually(lambda: server.open_streams() == 1)
        begun = server.open_streams()
    gone = time.monotonic()
    eventually(lambda: server.open_streams() == 0, 5)
    counted(gone_clients=begun, slots_held=server.open_streams())
    assert time.monotonic() - gone < 1  # two looks a tenth of a second apart, on a busy machine


def test_many_gone_clients_leave_nothing_behind(server: Server) -> None:
    paths = ["/generate", "/stream"] * 4
    connections = [server.connect("POST", path, SILENT) for path in paths]
    eventually(lambda: server.open_streams() == len(paths))
    for connection in connections:
        connection.close()
    eventually(lambda: server.open_streams() == 0, 5)


def test_a_stream_arrives_word_by_word(server: Server) -> None:
    with reading(server, {"prompt": "slow " + "word " * 40}) as response:
        assert b"data" in response.readline()
        assert server.open_streams() == 1  # the first word is here and the last is not yet made
        assert [name for name, _ in events(response.read().decode())][-1] == "done"


def test_sigterm_lets_running_streams_end_and_refuses_new_ones_meanwhile(tmp_path: Path) -> None:
    with Server(tmp_path, PASSWORD, GRACE_PERIOD="10") as server, ExitStack() as open_streams:
        body = {"prompt": "slow " + "word " * 30}
        streams = [open_streams.enter_context(reading(server, body)) for _ in range(4)]
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.ask("GET", "/readyz")["stage"] == "stopping", 2)
        with closing(server.connect("POST", "/generate", {"prompt": "hi"})) as late:
            assert late.getresponse().status == 503
        for stream in streams:
            assert [name for name, _ in events(stream.read().decode())][-1] == "done"
        assert server.process.wait(SECONDS) == 0


@pytest.mark.promise("P11", injected="SIGTERM with no grace, in the middle of a stream", counted="exit 0")
def test_what_outlives_the_grace_period_ends_with_an_error_event(tmp_path: Path, counted: Callable[..., None]) -> None:
    with Server(tmp_path, PASSWORD, GRACE_PERIOD="0") as server, reading(server, SILENT) as stream:
        server.process.send_signal(signal.SIGTERM)
        name, data = events(stream.read().decode())[-1]
        counted(ended_in_an_error=int(name == "error"))
        assert (name, data["error"]["code"]) == ("error", "model_unavailable")
        assert server.process.wait(SECONDS) == 0


def test_ctrl_c_ends_streams_in_words_and_the_server_at_once(tmp_path: Path) -> None:
    with Server(tmp_path, PASSWORD) as server, reading(server, SILENT) as stream:
        os.killpg(server.process.pid, signal.SIGINT)
        assert events(stream.read().decode())[-1][0] == "error"
        assert server.process.wait(10) == 0


def start(tmp_path: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "DATA_DIR": str(tmp_path / "data"), **settings}
    command = [sys.executable, "-m", "gunicorn", "tests.api.served:create()"]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=SECONDS)


def plain_lines(text: str) -> list[str]:
    """What is not a line of the log."""
    return [line for line in text.splitlines() if not line.startswith("{")]


def test_a_busy_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = start(tmp_path, PORT=port)
    assert done.returncode != 0
    assert plain_lines(done.stderr) == [
        f"PORT: 127.0.0.1:{port} is in use: stop what listens there, or choose another (for example PORT=5001)"
    ]


@pytest.mark.parametrize("host", ["192.0.2.1", "127.0.0..1", "2001:db8::1"])
def test_a_host_that_is_not_ours_is_one_line_that_names_it(tmp_path: Path, host: str) -> None:
    done = start(tmp_path, HOST=host)
    assert done.returncode != 0
    (line,) = plain_lines(done.stderr)
    assert line == f"HOST: {host} is no address of this machine (for example HOST=127.0.0.1)"


def test_a_model_loads_at_the_start_only_with_preload(server: Server, tmp_path: Path) -> None:
    assert not server.ask("GET", "/readyz")["details"]["preloaded"]
    with Server(tmp_path, PASSWORD, PRELOAD="true") as eager:
        assert eager.ask("GET", "/readyz")["details"]["preloaded"]


def test_a_wrong_setting_is_one_line_that_names_it_and_not_its_value(tmp_path: Path) -> None:
    done = start(tmp_path, ADMIN_PASSWORD="hunter2")
    assert done.returncode != 0
    (line,) = plain_lines(done.stderr)
    assert line.startswith("ADMIN_PASSWORD: ") and "hunter2" not in done.stderr + done.stdout


def test_a_data_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file, not a folder")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = str(free.getsockname()[1])
    done = start(tmp_path, PORT=port)
    assert done.returncode != 0
    (line,) = plain_lines(done.stderr)
    assert line.startswith("DATA_DIR: ") and "Traceback" not in done.stderr
