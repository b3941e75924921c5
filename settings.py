"""Every knob of the service, read from the environment once and refused early when wrong.

Does not act on any of them: no folder is made and no file is opened here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, IPvAnyNetwork, StringConstraints, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

Names = Annotated[tuple[str, ...], NoDecode]
Networks = Annotated[tuple[IPvAnyNetwork, ...], NoDecode]
_RULE = r"^(admin|user|auditor)\.((streams|rpm)=[1-9]\d{0,5}|tokens_per_day=\d{1,15})$"
RoleLimits = Annotated[tuple[Annotated[str, StringConstraints(pattern=_RULE)], ...], NoDecode]
PASSWORD_SHORTEST, PASSWORD_LONGEST = 8, 1024  # characters


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


class Settings(BaseSettings):
    """Field `data_dir` is the environment variable `DATA_DIR`, and so on; `.env.example` says what each is for."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    host: str = "127.0.0.1"
    port: int = Field(5000, ge=1, le=65535, examples=["5000"])
    data_dir: Path = Field(Path("data"), examples=["/var/lib/flask-llm"])
    database_url: str = Field(
        "", repr=False, pattern=r"^(postgresql\+psycopg://.*)?$", examples=["postgresql+psycopg://llm@db/llm"]
    )
    url_prefix: str = Field("", pattern=r"^(/[A-Za-z0-9._~-]+)*$", examples=["/llm"])
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", examples=["info"])
    log_file: Path | None = Field(None, examples=["/var/log/flask-llm.log"])

    model: str = Field("smollm2-135m-instruct", min_length=1, examples=["smollm2-135m-instruct"])
    models_allowed: Names = Field((), examples=["/models/my-model,org/name@<40-digit commit>"])
    quantization: Literal["nf4", "int8", "none"] = Field("nf4", examples=["nf4"])
    device: Literal["auto", "cpu", "cuda"] = Field("auto", examples=["auto"])
    threads: int = Field(0, ge=0, le=1024, examples=["4"])
    compile: bool = Field(True, examples=["on"])
    preload: bool = Field(False, examples=["true"])
    slots: int = Field(16, ge=1, le=256, examples=["16"])
    max_context: int = Field(0, ge=0, le=1 << 20, examples=["8192"])
    max_queue: int = Field(64, ge=1, le=10_000, examples=["64"])
    request_timeout: float = Field(300, gt=0, le=86_400, examples=["300"])
    grace_period: float = Field(30, ge=0, le=3600, examples=["30"])

    user_streams: int = Field(10, ge=1, examples=["10"])
    user_rpm: int = Field(120, ge=1, examples=["120"])
    user_tokens_per_day: int = Field(0, ge=0, examples=["200000"])
    role_limits: RoleLimits = Field((), examples=["admin.rpm=600,user.tokens_per_day=200000"])
    max_body: int = Field(1 << 20, ge=1024, le=1 << 30, examples=["1048576"])
    allowed_hosts: Names = Field((), examples=["llm.example.org,localhost"])
    trusted_proxies: int = Field(0, ge=0, le=8, examples=["1"])
    metrics_networks: Networks = Field((), examples=["10.1.0.0/16"])
    sanitise: Literal["strip", "off"] = Field("strip", examples=["strip"])

    redis_url: str | None = Field(None, repr=False, examples=["redis://127.0.0.1:6379/0"])
    redis_url_file: Path | None = Field(None, examples=["/run/secrets/redis_url"])
    cache_ttl: int = Field(3600, ge=0, le=31_536_000, examples=["3600"])
    cache_shared: bool = Field(False, examples=["false"])
    state_redis_url: str | None = Field(None, repr=False, examples=["redis://127.0.0.1:6380/0"])
    state_redis_url_file: Path | None = Field(None, examples=["/run/secrets/state_redis_url"])

    audit_dir: Path | None = Field(None, examples=["/var/log/flask-llm/audit"])
    audit_head: Path | None = Field(None, examples=["/mnt/other-disk/audit-head"])
    audit_days: int = Field(180, ge=1, le=36_500, examples=["180"])
    audit_content: bool = Field(False, examples=["false"])

    key_file: Path | None = Field(None, examples=["/run/secrets/keys"])
    jwt_secret_file: Path | None = Field(None, examples=["/run/secrets/jwt_secret"])
    admin_password: str | None = Field(
        None, min_length=PASSWORD_SHORTEST, max_length=PASSWORD_LONGEST, repr=False, examples=["a long passphrase"]
    )
    admin_password_file: Path | None = Field(None, examples=["/run/secrets/admin_password"])
    access_ttl: int = Field(900, ge=30, le=86_400, examples=["900"])
    refresh_ttl: int = Field(604_800, ge=60, le=31_536_000, examples=["604800"])

    @field_validator("models_allowed", "allowed_hosts", "metrics_networks", "role_limits", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(filter(None, (part.strip() for part in value.split(",")))) if isinstance(value, str) else value

    @classmethod
    def from_environment(cls) -> Settings:
        """The settings of this process. Raises SettingsError for the first wrong one; never echoes a value."""
        try:
            return cls()
        except ValidationError as error:
            raise SettingsError(_one_line(error)) from None

    @property
    def compute_threads(self) -> int:
        """Threads for the model: THREADS, or the cores this process may use, within its container's quota."""
        return self.threads or max(1, min(len(os.sched_getaffinity(0)), int(min(cpu_quota(), 1024))))


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = str(first["loc"][0])
    examples = Settings.model_fields[field].examples or ["see .env.example"]
    return f"{field.upper()}: {first['msg']} (for example {field.upper()}={examples[0]})"
