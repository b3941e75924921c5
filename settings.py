"""Every setting, read from the environment once and refused at the start when it is wrong."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, IPvAnyNetwork, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PASSWORD_SHORTEST, PASSWORD_LONGEST = 8, 1024  # characters

_SECRETS = ("database_url", "redis_url", "admin_password")  # NAME_FILE may name a file that holds the value
_log = logging.getLogger(__name__)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """How many cores the control group (v2, else v1) may use; infinite without a quota."""
    lines = own.read_text().splitlines() if own.exists() else []
    folders = [root, *(root / line.removeprefix("0::/") for line in lines if line.startswith("0::/"))]
    files = [[folder / "cpu.max"] for folder in folders]
    files.append([root / "cpu/cpu.cfs_quota_us", root / "cpu/cpu.cfs_period_us"])
    pairs = [" ".join(file.read_text() for file in pair).split() for pair in files if all(f.exists() for f in pair)]
    quotas = [int(quota) / int(period) for quota, period in pairs if quota not in ("max", "-1")]
    return min(quotas, default=float("inf"))


class SettingsError(Exception):
    """A setting is wrong. The message is one line: the variable, what is wrong with it, and an example."""


def _split(value: object) -> object:
    return tuple(filter(None, (part.strip() for part in value.split(",")))) if isinstance(value, str) else value


def _context(value: int) -> int:
    if 0 < value < 256:
        raise ValueError("must be 0 (what the model and the memory allow) or at least 256 tokens")
    return value


def _redis(value: str) -> str:
    from redis.connection import parse_url

    try:
        parse_url(value)  # type: ignore[no-untyped-call]
    except ValueError:  # its message may hold the password
        raise ValueError("is not the address of a Redis") from None
    return value


_REDIS = AfterValidator(_redis)
_POSTGRESQL = StringConstraints(pattern=r"^(postgresql\+psycopg://.*)?$")
_PASSWORD = StringConstraints(min_length=PASSWORD_SHORTEST, max_length=PASSWORD_LONGEST)
_HOST = StringConstraints(pattern=r"^[A-Za-z0-9._-]+$|^[0-9A-Fa-f:.]+$")
_LIMIT = StringConstraints(pattern=r"^(admin|user|auditor)\.((streams|rpm)=[1-9]\d{0,5}|tokens_per_day=\d{1,15})$")
_T = TypeVar("_T")
Listed = Annotated[tuple[_T, ...], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """Field `data_dir` is the environment variable `DATA_DIR`, and so on; `.env.example` says what each is for."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    host: str = "127.0.0.1"
    port: int = Field(5000, ge=1, le=65535, examples=["5001"])
    data_dir: Path = Field(Path("data"), examples=["/var/lib/flask-llm"])
    database_url: Annotated[str, _POSTGRESQL] = Field("", repr=False, examples=["postgresql+psycopg://llm@db/llm"])
    url_prefix: str = Field("", pattern=r"^(/[A-Za-z0-9._~-]+)*$", examples=["/llm"])
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_file: Path | None = Field(None, examples=["/var/log/flask-llm.log"])

    model: str = Field("smollm2-135m-instruct", min_length=1)
    models_allowed: Listed[str] = Field((), examples=["org/name@<40-digit commit>"])
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    device: Literal["auto", "cpu", "cuda"] = Field("auto", examples=["cpu"])
    threads: int = Field(0, ge=0, le=1024, examples=["4"])
    compile: bool = Field(True, examples=["on"])
    speculate: bool = Field(True, examples=["on"])
    preload: bool = Field(False, examples=["true"])
    slots: int = Field(16, ge=1, le=256)
    max_context: Annotated[int, AfterValidator(_context)] = Field(0, ge=0, le=1 << 20, examples=["8192"])
    max_queue: int = Field(64, ge=1, le=10_000)
    request_timeout: float = Field(300, gt=0, le=86_400)
    grace_period: float = Field(30, ge=0, le=3600)

    user_streams: int = Field(10, ge=1)
    user_rpm: int = Field(120, ge=1)
    user_tokens_per_day: int = Field(0, ge=0, examples=["200000"])
    role_limits: Listed[Annotated[str, _LIMIT]] = Field((), examples=["admin.rpm=600,user.tokens_per_day=200000"])
    max_body: int = Field(1 << 20, ge=1024, le=1 << 30)
    allowed_hosts: Listed[Annotated[str, _HOST]] = Field((), examples=["llm.example.org,localhost"])
    trusted_proxies: int = Field(0, ge=0, le=8, examples=["1"])
    metrics_networks: Listed[IPvAnyNetwork] = Field((), examples=["10.1.0.0/16"])
    sanitise: Literal["active", "strip", "off"] = "active"

    redis_url: Annotated[str, _REDIS] | None = Field(None, repr=False, examples=["redis://127.0.0.1:6379/0"])
    cache_ttl: int = Field(3600, ge=0, le=31_536_000)
    cache_shared: bool = Field(False, examples=["false"])

    audit_head: Path | None = Field(None, examples=["/mnt/other-disk/audit-head"])
    audit_days: int = Field(180, ge=1, le=36_500)
    audit_content: bool = Field(False, examples=["false"])

    key_file: Path | None = Field(None, examples=["/run/secrets/keys"])
    jwt_secret_file: Path | None = Field(None, examples=["/run/secrets/jwt_secret"])
    admin_password: Annotated[str, _PASSWORD] | None = Field(None, repr=False, examples=["a long passphrase"])
    access_ttl: int = Field(900, ge=30, le=86_400)
    refresh_ttl: int = Field(604_800, ge=60, le=31_536_000)

    @classmethod
    def from_environment(cls) -> Settings:
        """The settings of this process. Raises SettingsError for the first wrong one; never echoes a value."""
        given: dict[str, Any] = {}
        for name in _SECRETS:
            if file := os.environ.get(variable := f"{name.upper()}_FILE"):
                with usable(variable, "read"):
                    given[name] = Path(file).read_text("utf-8").strip()
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            name = str(first["loc"][0])
            variable = f"{name.upper()}_FILE" if name in given else name.upper()
            raise _wrong(variable, first["msg"].removeprefix("Value error, ")) from None

    @property
    def compute_threads(self) -> int:
        """Threads for the model: THREADS, or the cores this process may use, within its container's quota."""
        return self.threads or max(1, min(len(os.sched_getaffinity(0)), int(min(cpu_quota(), 1024))))


def check(settings: Settings, listening: bool = True) -> None:
    """Make DATA_DIR (mode 700); raise SettingsError for what this machine does not allow, before any slow work.

    listening: whether this process, or the one it prepares for, will listen on PORT.
    """
    known = {field.upper() for field in Settings.model_fields}
    for name in sorted(set(os.environ) - known - {f"{field.upper()}_FILE" for field in _SECRETS}):
        for meant in difflib.get_close_matches(name, known, 1, cutoff=0.8):
            _log.warning("%s is not a setting: did you mean %s?", name, meant)
    with usable("DATA_DIR", "write"):
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.data_dir).close()
    with usable("LOG_FILE", "write"):
        if settings.log_file:
            settings.log_file.open("a").close()
    if settings.device == "cuda" and not _has_gpu():
        line = "no NVIDIA GPU is seen; install its driver, 580 or newer, and for Docker the NVIDIA Container Toolkit"
        raise _wrong("DEVICE", line)
    if listening:
        _check_port(settings.host, settings.port)


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError as error:
            raise _wrong("PORT", f"{host}:{port}: {error.strerror}") from None
        except (OSError, UnicodeError) as error:
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                raise _wrong("HOST", f"{host} is no address of this machine") from None
            raise _wrong("PORT", f"{host}:{port} is in use: stop what listens there, or choose another") from None


def _has_gpu() -> bool:
    import pynvml

    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return False


@contextmanager
def usable(variable: str, action: str) -> Iterator[None]:
    """Turn what the file system says about a file into a SettingsError that names its variable."""
    try:
        yield
    except UnicodeDecodeError:
        raise _wrong(variable, "the file is not text in UTF-8") from None
    except OSError as error:
        raise _wrong(variable, f"cannot {action} {error.filename}: {error.strerror}") from None


def _wrong(variable: str, problem: str) -> SettingsError:
    field = Settings.model_fields.get(variable.lower())
    default = field.default if field else f"/run/secrets/{variable.lower().removesuffix('_file')}"
    example = field.examples[0] if field and field.examples else default
    return SettingsError(f"{variable}: {problem} (for example {variable}={example})")
