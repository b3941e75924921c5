"""What operators see: the Prometheus metrics.

Holds no policy, and no label ever takes a value from a user.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """All collectors of one app, on a registry of its own. Seconds, bytes and tokens throughout."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, registry=self.registry, buckets=_SECONDS)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

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
        self.tokens_per_second = gauge("llm_tokens_per_second", "Generated tokens, over the last seconds.")
        self.gpu_memory = gauge("llm_gpu_memory_bytes", "Bytes in use on the GPU (0 without one).")
        self.gpu_utilisation = gauge("llm_gpu_utilisation_ratio", "Share of time the GPU was busy (0 without one).")
        self.compiled = gauge("llm_compiled_buckets", "Compiled decode steps in use.")
        self.prompt_tokens = counter("llm_prompt_tokens_total", "Prompt tokens computed.")
        self.cached_tokens = counter("llm_cached_prompt_tokens_total", "Prompt tokens whose KV was reused.")
        self.generated_tokens = counter("llm_generated_tokens_total", "Tokens generated.")
        self.finished = counter("llm_requests_finished_total", "Finished requests.", "reason")
        self.compile_fallbacks = counter("llm_compile_fallbacks_total", "Buckets left eager because compiling failed.")
        self.engine_failures = counter("llm_engine_failures_total", "Steps that raised.")
        self.cache_lookups = counter("llm_cache_lookups_total", "Response cache look-ups.", "result")
        self.breaker_open = gauge("llm_cache_breaker_open", "1 while the cache is given a rest after faults.")
