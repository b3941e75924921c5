"""Servers to compare, each started the way its own documentation says, on loopback and with the same weights.

Measures nothing but the start; the rows do.
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

from benchmarks.peers import LLAMA_SERVER, TRANSFORMERS, VLLM, PeerMissing, last_line, program_of
from benchmarks.worker import ROOT
from ops.stack import StackError, free_port, listening, program
from settings import Settings

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
def this_service(port: int, data: Path, log: Path, more: Mapping[str, str] | None = None) -> Iterator[Server]:
    """`make run`'s server with PRELOAD, ready to generate; compiled steps are used as far as DATA_DIR has them."""
    command = [sys.executable, "-m", "gunicorn", "app:create_app()"]
    settings = service_settings(port, data) | dict(more or {})
    with other_server("this service", command, f"http://127.0.0.1:{port}", "/readyz", log, settings) as server:
        yield signed_in(server)


def service_settings(port: int, data: Path) -> dict[str, str]:
    """The service's environment: ready to generate at once, and no limit in a benchmark's way."""
    return {"PORT": str(port), "DATA_DIR": str(data), "PRELOAD": "true", "ADMIN_PASSWORD": PASSWORD,
            "USER_STREAMS": "200", "USER_RPM": "100000000", "MAX_QUEUE": "200", "LOG_LEVEL": "warning"}  # fmt: skip


def signed_in(server: Server) -> Server:
    """The same server with an API key, spoken to as OpenAI's clients do."""
    token = _json(f"{server.url}/login", {"username": "admin", "password": PASSWORD})["access_token"]
    server.key = str(_json(f"{server.url}/keys", {"name": "bench", "expires_in_days": 1}, str(token))["key"])
    server.url, server.model = f"{server.url}/v1", "smollm2-135m-instruct"
    return server


def data_folder(settings: Settings, folder: Path) -> Path:
    """A data folder of the benchmark's own, but for the models and the compiled steps."""
    data = folder / "data"
    if not data.exists():
        data.mkdir()
        for shared in ("models", "compiled", "wheels"):
            (settings.data_dir / shared).mkdir(parents=True, exist_ok=True)
            (data / shared).symlink_to((settings.data_dir / shared).resolve())
    return data


def until_compiled(server: Server, patience: float) -> None:
    """This service compiles in the background: wait until all is in use, as it is from the second start on.

    Another server has no such thing, and is not waited for.
    """
    end, seen = time.monotonic() + patience, ""
    while time.monotonic() < end:
        try:
            details = _json(server.url.removesuffix("/v1") + "/readyz", None)["details"]
            compiled, failed = str(details["compiled"]), int(details["compile_failures"])  # type: ignore[index]
        except (OSError, ValueError, KeyError):
            return
        done, _, wanted = compiled.partition("/")
        if int(done) + failed >= int(wanted):
            return
        if compiled != seen:
            end, seen = time.monotonic() + patience, compiled
        time.sleep(1)


@contextmanager
def transformers_serve(port: int, checkpoint: Path, log: Path) -> Iterator[Server]:
    """transformers' own server over the same NF4 checkpoint."""
    command = [str(TRANSFORMERS.bin() / "transformers"), "serve", str(checkpoint), "--port", str(port),
               "--host", "127.0.0.1", "--continuous-batching"]  # fmt: skip
    with other_server(TRANSFORMERS.name, command, f"http://127.0.0.1:{port}", "/health", log, _offline()) as server:
        server.url, server.model = f"{server.url}/v1", str(checkpoint)
        yield server


@contextmanager
def llama_server(port: int, model: Path, log: Path, slots: int = 16, context: int = 2048) -> Iterator[Server]:
    """llama.cpp's own server over the GGUF itself, `context` tokens a slot."""
    command = [str(program_of(LLAMA_SERVER, "llama-server")), "-m", str(model), "--host", "127.0.0.1",
               "--port", str(port), "-np", str(slots), "-c", str(slots * context), "-t", _threads()]  # fmt: skip
    with other_server(LLAMA_SERVER.name, command, f"http://127.0.0.1:{port}", "/health", log) as server:
        server.url, server.model = f"{server.url}/v1", "default"
        yield server


@contextmanager
def vllm_serve(port: int, dense: Path, log: Path, slots: int = 16, context: int = 2048) -> Iterator[Server]:
    """vLLM on the CPU over the dense weights in bf16, the only ones that it can serve there."""
    command = [str(VLLM.bin() / "vllm"), "serve", str(dense), "--host", "127.0.0.1", "--port", str(port),
               "--dtype", "bfloat16", "--max-model-len", str(context), "--max-num-seqs", str(slots)]  # fmt: skip
    settings = _offline() | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    with other_server(VLLM.name, command, f"http://127.0.0.1:{port}", "/health", log, settings) as server:
        server.url, server.model = f"{server.url}/v1", str(dense)
        yield server


@contextmanager
def redis(log: Path) -> Iterator[str]:
    """The address of a redis-server of its own on loopback that keeps nothing on disk. Raises PeerMissing."""
    port = free_port()
    try:
        command = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    except StackError as missing:
        raise PeerMissing(str(missing)) from None
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            end = time.monotonic() + 20
            while not listening(port) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()


@contextmanager
def other_server(
    name: str, command: list[str], url: str, health: str, log: Path, settings: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Any server, from its command to its end. Raises ConnectionError when `health` does not answer 200 in time."""
    begin = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | dict(settings or {}), stdout=output, stderr=output
        )
    server = Server(name, url, "", psutil.Process(process.pid))
    try:
        while not answers(url + health):
            if process.poll() is not None or time.perf_counter() - begin > PATIENCE:
                raise ConnectionError(f"{name} does not start: {last_line(log)}")
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


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _offline() -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": _threads()}


def _threads() -> str:
    return str(Settings.from_environment().compute_threads)


def _json(url: str, body: object, token: str = "") -> dict[str, object]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        found: dict[str, object] = json.load(response)
        return found
