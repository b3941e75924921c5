"""A real gunicorn with the real configuration, as a child process on a free port of loopback."""

from __future__ import annotations

import copy
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Self

from ops import stack
from tests.conftest import lacking

ROOT = Path(__file__).parents[2]
SECONDS = 20.0


def eventually(holds: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """The first true value of `holds`; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
    return value


class FrontDoor:
    """The repository's nginx in front of `server`, for as long as it is entered: TLS on `port` of loopback."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.port = stack.free_port()
        self._server, self._folder = server, folder.resolve()
        self._process: subprocess.Popen[bytes] | None = None
        self._trusted = ssl.create_default_context()

    def __enter__(self) -> Self:
        try:
            stack.make_secrets(self._folder / "secrets")
            conf = stack.nginx_conf(self._folder / "secrets", self.port, stack.free_port(), self._server.port)
            (self._folder / "nginx.conf").write_text(conf)
            command = stack.nginx_command(self._folder)
        except stack.StackError as missing:
            lacking(str(missing))
        self._trusted.load_verify_locations(self._folder / "secrets" / "tls.crt")
        with (self._folder / "nginx.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        eventually(lambda: stack.listening(self.port))
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait(SECONDS)

    def dial(self, address: str) -> ssl.SSLSocket:
        """A connection from this address of loopback, its handshake done and nothing sent; it holds little unread."""
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.settimeout(SECONDS)
        plain.bind((address, 0))
        plain.connect(("127.0.0.1", self.port))
        return self._trusted.wrap_socket(plain, server_hostname="localhost")

    def connect(
        self, method: str, path: str, body: object = None, address: str = "127.0.0.1"
    ) -> http.client.HTTPConnection:
        """A connection with a request of the server's user on it, the answer not yet read."""
        connection = http.client.HTTPConnection("localhost", self.port, timeout=SECONDS)
        connection.sock = self.dial(address)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._server.token}"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection


class Server:
    """Serves `application`, for as long as it is entered, and logs in as admin."""

    def __init__(
        self, folder: Path, password: str, application: str = "tests.api.served:create()", **settings: str
    ) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port: int = free.getsockname()[1]
        self.log = folder / "log"
        own = {"PORT": str(self.port), "DATA_DIR": str(folder / "data"), "ADMIN_PASSWORD": password}
        environ = {**os.environ, **own, "USER_RPM": "10000", **settings}
        command = [sys.executable, "-m", "gunicorn", application]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True
            )
        self._password = password
        self.token = ""

    def __enter__(self) -> Self:
        try:
            eventually(self._answers)
        except BaseException:
            self.__exit__()
            raise
        answer = self.ask("POST", "/login", {"username": "admin", "password": self._password})
        self.token = answer["access_token"]
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(SECONDS)

    def connect(self, method: str, path: str, body: object = None) -> http.client.HTTPConnection:
        """A connection with a request on it, the answer not yet read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self.token}"} if self.token else {}),
        }
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection

    def ask(self, method: str, path: str, body: object = None) -> Any:
        with closing(self.connect(method, path, body)) as connection:
            return json.loads(connection.getresponse().read())

    def metric(self, name: str) -> float:
        """The value of one series, with its labels as Prometheus writes them; 0 where it has none yet."""
        with closing(self.connect("GET", "/metrics")) as connection:
            lines = connection.getresponse().read().decode().splitlines()
        return next((float(line.split(" ")[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def as_user(self, name: str) -> Server:
        """The same server, spoken to by a new user."""
        made = self.ask("POST", "/admin/users", {"username": name, "password": self._password})
        assert made["username"] == name, made
        other = copy.copy(self)
        other.token = ""
        other.token = other.ask("POST", "/login", {"username": name, "password": self._password})["access_token"]
        return other

    def open_streams(self) -> int:
        """How many generations the backend is working on, by its own count."""
        return int(self.ask("GET", "/readyz")["details"]["open"])

    def raw(self, request: bytes) -> int:
        """The status that these bytes get."""
        with closing(socket.create_connection(("127.0.0.1", self.port), SECONDS)) as connection:
            connection.sendall(request)
            return int(connection.makefile("rb").readline().split()[1])

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return bool(self.ask("GET", "/healthz"))
        except OSError:
            return False
