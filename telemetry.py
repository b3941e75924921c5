"""What operators see: structured logs, the request id and the Prometheus metrics.

No label ever takes a value from a user, and no line holds a prompt, a token or a password.
"""

from __future__ import annotations

import logging
import re
import sys
from functools import partial
from logging.handlers import RotatingFileHandler
from pathlib import Path
from secrets import token_hex

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.typing import EventDict, Processor, WrappedLogger

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """All collectors of one app, on a registry of its own. Seconds, bytes and tokens throughout."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=_SECONDS)
        gauge = partial(Gauge, registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        self.ttft = histogram("llm_time_to_first_token_seconds", "From submission to the first token.")
        self.itl = histogram("llm_inter_token_seconds", "Between two tokens of one stream.")
        self.e2e = histogram("llm_request_seconds", "From submission to the end of a generation.")
        self.queue_wait = histogram("llm_queue_seconds", "From submission to a slot.")
        self.prefill = histogram("llm_prefill_seconds", "Computing a prompt's KV, waiting between chunks included.")
        self.decode = histogram("llm_decode_seconds", "From the first token to the last.")
        self.running = gauge("llm_requests_running", "Requests that hold a slot.")
        self.waiting = gauge("llm_requests_waiting", "Requests queued for a slot.")
        self.slots = gauge("llm_slots", "Slots there are.")
        self.kv_bytes = gauge("llm_kv_bytes", "Bytes of the KV tensors.")
        self.kv_blocks_used = gauge("llm_kv_blocks_used", "KV blocks of 256 tokens that requests hold.")
        self.kv_blocks_free = gauge("llm_kv_blocks_free", "KV blocks that nobody holds; some are found again.")
        self.preemptions = counter("llm_preemptions_total", "Requests that gave their KV back, to be computed again.")
        self.tokens_per_second = gauge("llm_tokens_per_second", "Generated tokens, over the last seconds.")
        self.gpu_memory = gauge("llm_gpu_memory_bytes", "Bytes in use on the GPU (0 without one).")
        self.gpu_utilisation = gauge("llm_gpu_utilisation_ratio", "Share of time the GPU was busy (0 without one).")
        self.compiled = gauge("llm_compiled_buckets", "Compiled decode steps in use.")
        self.prompt_tokens = counter("llm_prompt_tokens_total", "Prompt tokens computed.")
        self.cached_tokens = counter("llm_cached_prompt_tokens_total", "Prompt tokens whose KV was reused.")
        self.generated_tokens = counter("llm_generated_tokens_total", "Tokens generated.")
        self.finished = counter("llm_requests_finished_total", "Finished requests.", ["reason"])
        self.compile_fallbacks = counter("llm_compile_fallbacks_total", "Buckets left eager because compiling failed.")
        self.engine_failures = counter("llm_engine_failures_total", "Steps that raised.")
        self.cache_lookups = counter("llm_cache_lookups_total", "Response cache look-ups.", ["result"])
        self.audit_records = counter("llm_audit_records_total", "Audit records: written, or failed to be.", ["result"])
        self.audit_last_seq = gauge("llm_audit_last_seq", "Newest audit record's number, by the log's id.", ["log"])
        self.audit_commit = histogram("llm_audit_commit_seconds", "Making a batch of audit records durable.")
        self.breaker_open = gauge("llm_cache_breaker_open", "1 while the cache is given a rest after faults.")

    def audited(self, records: int, seconds: float, written: bool) -> None:
        """One commit of the audit log."""
        self.audit_records.labels("written" if written else "failed").inc(records)
        self.audit_commit.observe(seconds)


_HANDLER = "flask-llm"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Our own lines hold none of these; a server's or a library's complaint about a request line or header may.
_SECRET = re.compile(r"(?i)(bearer\s+|ticket=)[^\s\"'&]+|eyJ[\w-]+\.[\w-]+\.[\w-]*")


def configure_logging(level: str = "info", file: Path | None = None) -> None:
    """Every log line of the process, other libraries' too: plain on a terminal, else one JSON object a line.

    file: a rotating file instead of stderr. Raises OSError when it cannot be written.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = RotatingFileHandler(file, maxBytes=10 << 20, backupCount=5) if file else logging.StreamHandler(sys.stderr)
    handler.set_name(_HANDLER)
    plain = ConsoleRenderer(sort_keys=False, pad_event_to=0, exception_formatter=plain_traceback)
    render: list[Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
        _mask,
        plain if not file and sys.stderr.isatty() else structlog.processors.JSONRenderer(),
    ]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=render))
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of itself at every start
    root = logging.getLogger()
    for earlier in [other for other in root.handlers if other.get_name() == _HANDLER]:
        root.removeHandler(earlier)
        earlier.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def request_id(offered: str | None) -> str:
    """The caller's id for a request where it is plain and short, else a fresh one."""
    return offered if offered and _REQUEST_ID.fullmatch(offered) else token_hex(16)


def _mask(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    return {key: _SECRET.sub("[masked]", value) if isinstance(value, str) else value for key, value in event.items()}
