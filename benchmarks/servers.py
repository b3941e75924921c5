"""Servers to compare, each started the way its own documentation says, on loopback and with the same weights.

Measures nothing but the start; `http.py` does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers"
# What the peers' environment holds; torch and transformers are this service's own versions.
PEER_PACKAGES = ("torch==2.13.0", "transformers[serving]==5.23.0", "bitsandbytes==0.50.2", "accelerate==1.15.0")
PASSWORD = "a benchmark needs a password"
PATIENCE = 300.0  # seconds for a server to come up


@dataclass(slots=True)
class Server:
    """A running server. start: seconds from the command to the first successful readiness check."""

    name: str
    url: str
    model: str
    process: psutil.Process
    key: str = ""
    start: float = field(default=float("nan"))

    @property
    def memory(self) -> int:
        """Resident bytes of the server and its children."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(process.memory_info().rss for process in family if process.is_running())

    @property
    def cpu_seconds(self) -> float:
        """Processor time used so far by the server and its living children."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in family if process.is_running())


@contextmanager
def this_service(port: int, data: Path, log: Path) -> Iterator[Server]:
    """`make run`'s server with PRELOAD, ready to generate; compiled steps are used as far as DATA_DIR has them."""
    settings = {"PORT": str(port), "DATA_DIR": str(data), "PRELOAD": "true", "ADMIN_PASSWORD": PASSWORD,
                "USER_STREAMS": "100", "USER_RPM": "100000", "LOG_LEVEL": "warning"}  # fmt: skip
    command = [sys.executable, "-m", "gunicorn", "app:create_app()"]
    with _running("this service", command, f"http://127.0.0.1:{port}", "/readyz", settings, log) as server:
        token = _json(f"{server.url}/login", {"username": "admin", "password": PASSWORD})["access_token"]
        server.key = str(_json(f"{server.url}/keys", {"name": "bench", "expires_in_days": 1}, str(token))["key"])
        server.url, server.model = f"{server.url}/v1", "smollm2-135m-instruct"
        yield server


@contextmanager
def transformers_serve(port: int, checkpoint: Path, log: Path, batching: bool = True) -> Iterator[Server]:
    """transformers' own server over the same NF4 checkpoint, in an environment of its own."""
    command = [str(peers() / "transformers"), "serve", str(checkpoint), "--port", str(port),
               "--host", "127.0.0.1", *(["--continuous-batching"] if batching else [])]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    url = f"http://127.0.0.1:{port}"
    name = "transformers serve" + (" --continuous-batching" if batching else "")
    with _running(name, command, url, "/health", offline, log) as server:
        server.url, server.model = f"{url}/v1", str(checkpoint)
        yield server


def peers() -> Path:
    """The `bin` folder of the peers' environment, made at the first use (minutes)."""
    if not (PEERS / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
        subprocess.run([PEERS / "bin/python", "-m", "pip", "install", "--quiet", *PEER_PACKAGES], check=True)
        (PEERS / "installed").touch()
    return PEERS / "bin"


@contextmanager
def _running(
    name: str, command: list[str], url: str, health: str, settings: Mapping[str, str], log: Path
) -> Iterator[Server]:
    begin = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=output, stderr=output)
    server = Server(name, url, "", psutil.Process(process.pid))
    try:
        while not _answers(url + health):
            if process.poll() is not None or time.perf_counter() - begin > PATIENCE:
                raise ConnectionError(f"{name} does not start, see {log}")
            time.sleep(0.05)
        server.start = time.perf_counter() - begin
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _json(url: str, body: object, token: str = "") -> dict[str, object]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        found: dict[str, object] = json.load(response)
        return found
