"""Settings from the environment and from files, and what is refused in the first second."""

from __future__ import annotations

import logging
import os
import socket
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from settings import Settings, SettingsError, check

ROOT = Path(__file__).parents[1]


def refusal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """The one line that a start with this environment ends in; HOST and PORT are checked too."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        check(Settings.from_environment())
    line = str(caught.value)
    assert "\n" not in line and "hunter2" not in line and "(for example " in line
    return line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLOTS", "many"),
        ("MAX_CONTEXT", "5"),
        ("ALLOWED_HOSTS", "http://x/"),
        ("ALLOWED_HOSTS", "llm.example.org,*"),
        ("ROLE_LIMITS", "king.rpm=1"),
        ("METRICS_NETWORKS", "10.1.0.0/99"),
        ("REDIS_URL", "http://:hunter2@localhost"),
        ("REDIS_URL", "redis://:hunter2@localhost:notaport/0"),
        ("DATABASE_URL", "mysql://root:hunter2@db/llm"),
        ("URL_PREFIX", "llm/"),
        ("SANITISE", "yes"),
        ("ADMIN_PASSWORD", "hunter2"),
        ("DATA_DIR", "/proc/foo"),
        ("DATA_DIR", "/dev/null/data"),
        ("LOG_FILE", "/nowhere/log"),
        ("REDIS_URL_FILE", "/nowhere/redis"),
        ("ADMIN_PASSWORD_FILE", "/nowhere/password"),
        ("HOST", "192.0.2.1"),
        ("HOST", "127.0.0..1"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    assert refusal(monkeypatch, **{name: value}).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ADMIN_PASSWORD_FILE", b"hunter2\n"),
        ("ADMIN_PASSWORD_FILE", b"hunter2" * 1000),
        ("ADMIN_PASSWORD_FILE", b"hunter2 hunter2 \xff"),
        ("REDIS_URL_FILE", b"hunter2"),
        ("DATABASE_URL_FILE", b"postgres://:hunter2@db"),
    ],
)
def test_a_file_with_the_wrong_content_is_named_and_not_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / "file").write_bytes(content)
    line = refusal(monkeypatch, DATA_DIR=str(tmp_path / "data"), **{name: str(tmp_path / "file")})
    assert line.startswith(f"{name}: ")


def test_a_secret_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("from a file, with a line end\n")
    monkeypatch.setenv("ADMIN_PASSWORD", "of the environment")
    monkeypatch.setenv("ADMIN_PASSWORD_FILE", str(tmp_path / "password"))
    assert Settings.from_environment().admin_password == "from a file, with a line end"


def test_a_busy_port_is_refused_unless_nothing_will_listen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        line = refusal(monkeypatch, PORT=str(port), DATA_DIR=str(tmp_path))
        assert line.startswith(f"PORT: 127.0.0.1:{port} is in use") and "PORT=5001" in line
        check(Settings.from_environment(), listening=False)


def test_cuda_without_a_gpu_is_refused_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlInit", _no_driver)
    assert refusal(monkeypatch, DEVICE="cuda", DATA_DIR=str(tmp_path)).startswith("DEVICE: ")


def _no_driver() -> None:
    import pynvml

    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


@pytest.mark.parametrize(
    ("wrong", "meant"), [("MODLE", "MODEL"), ("USER_STREAM", "USER_STREAMS"), ("THREDS", "THREADS")]
)
def test_a_misspelt_name_is_a_warning_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: str, meant: str
) -> None:
    monkeypatch.setenv(wrong, "1")
    check(Settings(data_dir=tmp_path), listening=False)
    assert f"{wrong} is not a setting: did you mean {meant}?" in caplog.messages


def test_the_names_of_an_ordinary_environment_are_no_warnings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ordinary = "HOME HOSTNAME USER LOGNAME SHELL LANG TERM PATH PWD HTTPS_PROXY SSL_CERT_FILE HF_TOKEN HF_ENDPOINT"
    for name in f"{ordinary} DOMAIN HTTPS_PORT LOGIN_RATE API_RATE REDIS_URL_FILE".split():
        monkeypatch.setenv(name, "x")
    with caplog.at_level(logging.WARNING):
        check(Settings(data_dir=tmp_path), listening=False)
    assert not caplog.messages


def test_the_data_folder_is_for_this_user_only(tmp_path: Path) -> None:
    folder = tmp_path / "deeper" / "data"
    check(Settings(data_dir=folder), listening=False)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "setting",
    [
        {"LOG_FILE": "/nowhere/log"},
        {"SLOTS": "0"},
        {"MODEL": "no-such-model"},
        {"KEY_FILE": "/nowhere/keys"},
        {"KEY_FILE": str(ROOT / "Makefile")},
        {"JWT_SECRET_FILE": os.devnull},
    ],
    ids=str,
)
def test_make_model_ends_in_one_line_before_anything_is_fetched(tmp_path: Path, setting: dict[str, str]) -> None:
    environment = {**os.environ, "DATA_DIR": str(tmp_path / "data"), **setting}
    command = [sys.executable, "-m", "model"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(next(iter(setting))) or str(ROOT / "Makefile") in line
    assert not list((tmp_path / "data").glob("*"))
