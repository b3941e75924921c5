"""Runs redis-server, gunicorn and nginx together on loopback: docker-compose.yml without Docker, and without isolation.

python -m ops.stack            until Ctrl-C, on https://localhost:8443 (HTTPS_PORT)
python -m ops.stack --check    only has nginx check nginx.conf
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

ROOT = Path(__file__).parents[1]
START_SECONDS = 60.0
STOP_SECONDS = 40.0  # longer than GRACE_PERIOD's default, as docker-compose.yml's stop_grace_period


class StackError(Exception):
    """The stack cannot start or go on. The message is one line that says what to do."""


def free_port() -> int:
    """A TCP port of loopback that is free at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def listening(port: int) -> bool:
    """Whether this port of loopback accepts connections."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def program(name: str) -> str:
    """The path of a program of the distribution. Raises StackError where it is not installed."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if not found:
        raise StackError(f"{name} is not installed (apt install {name})")
    return found


def make_secrets(folder: Path) -> None:
    """Fills the folder as docker compose's `secrets/`, unless it is there. Raises StackError."""
    if not folder.exists():
        _script("make-secrets", folder)


def nginx_conf(secrets: Path, https: int, http: int, app: int) -> str:
    """nginx.conf for these places; its rates come from the environment. Raises StackError."""
    places = {"HTTPS_LISTEN": f"127.0.0.1:{https}", "HTTP_LISTEN": f"127.0.0.1:{http}", "APP": f"127.0.0.1:{app}"}
    return _script("nginx-conf", ROOT / "nginx.conf", **places, SECRETS=str(secrets.resolve()))


def nginx_command(folder: Path) -> list[str]:
    """How to run nginx on `folder/nginx.conf` without touching anything outside the folder."""
    # As root, its workers would be another user, who may not enter a private folder to spool bodies.
    directives = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")
    return [program("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr", "-g", directives]


def _script(name: str, argument: Path, **environment: str) -> str:
    command = [str(ROOT / "ops" / name), str(argument)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise StackError(done.stderr.strip())
    return done.stdout


@dataclass
class Stack:
    """The processes as a context: started and answering inside, drained and ended after it.

    folder: for certificate, secrets and nginx's files, made when missing and kept. settings: the app's environment,
    beside this process's own. output: for what they print. parts: which of the three to run.
    """

    folder: Path
    settings: Mapping[str, str]
    https: int
    output: IO[bytes] | None = None
    parts: Collection[str] = ("redis-server", "gunicorn", "nginx")
    http: int = field(default_factory=free_port)
    app: int = field(default_factory=free_port)
    redis: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.secrets = self.folder / "secrets"
        make_secrets(self.secrets)
        (self.folder / "nginx.conf").write_text(nginx_conf(self.secrets, self.https, self.http, self.app))

    def __enter__(self) -> Self:
        try:
            for name in self.parts:
                self._start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """The app drains first, while nginx still carries its last streams out and Redis still answers."""
        for name in ("gunicorn", "nginx", "redis-server"):
            if process := self.processes.pop(name, None):
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def wait(self) -> None:
        """Returns never: raises StackError when one of the processes ends."""
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        ended = [name for name, process in self.processes.items() if process.poll() is not None]
        raise StackError(f"{' and '.join(ended)} ended by itself; its last lines above say why")

    def _start(self, name: str) -> None:
        command, port = self._command(name)
        # In a session of its own, so that Ctrl-C reaches this process alone and they end in their order.
        process = self.processes[name] = subprocess.Popen(
            command, cwd=ROOT, env=self._environment(), stdout=self.output, stderr=self.output, start_new_session=True
        )
        deadline = time.monotonic() + START_SECONDS
        while not listening(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise StackError(f"{name} did not start; its last lines above say why")
            time.sleep(0.05)

    def _command(self, name: str) -> tuple[list[str], int]:
        if name == "nginx":
            return nginx_command(self.folder), self.https
        if name == "gunicorn":
            return [sys.executable, "-m", "gunicorn", "app:create_app()"], self.app
        place = ["--port", str(self.redis), "--bind", "127.0.0.1", "--aclfile", str(self.secrets / "redis_users.acl")]
        bounds = ["--maxmemory", "256mb", "--maxmemory-policy", "allkeys-lru", "--save", ""]
        return [program("redis-server"), *place, *bounds], self.redis

    def _environment(self) -> dict[str, str]:
        redis_url = (self.secrets / "redis_url").read_text().strip().replace("redis:6379", f"127.0.0.1:{self.redis}")
        place = {"HOST": "127.0.0.1", "PORT": str(self.app), "REDIS_URL": redis_url, "TRUSTED_PROXIES": "1"}
        environment = {**os.environ, **place, **self.settings}
        if not environment.get("ADMIN_PASSWORD"):
            environment.setdefault("ADMIN_PASSWORD_FILE", str(self.secrets / "admin_password"))
        return environment


def check_nginx() -> None:
    """Has nginx read nginx.conf, with a throw-away certificate. Raises StackError when it objects."""
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(Path(folder), {}, free_port())
        if subprocess.run([*nginx_command(stack.folder), "-t"]).returncode:
            raise StackError("nginx.conf is wrong; nginx says above where")


def main() -> None:
    https = int(os.environ.get("HTTPS_PORT", "8443"))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    if listening(https):
        raise StackError(f"port {https} is taken; name another: make stack HTTPS_PORT=9443")
    with Stack(Path(os.environ.get("DATA_DIR") or "data") / "stack", {}, https) as stack:
        print(f"Open https://localhost:{https} (a certificate of its own: curl -k). Ctrl-C ends it.")
        print(f"A first start gave admin the password in {stack.secrets}/admin_password.", flush=True)
        stack.wait()


if __name__ == "__main__":
    try:
        check_nginx() if "--check" in sys.argv else main()
    except StackError as error:
        sys.exit(f"stack: {error}")
    except KeyboardInterrupt:
        print("stack: ended")
