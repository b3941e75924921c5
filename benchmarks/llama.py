"""llama.cpp's bare step through llama-cpp-python's low-level batch, as a worker in that package's own environment.

    python -m benchmarks.llama MODEL.gguf THREADS

Leaves out everything above llama_decode but greedy choice, as the other side does. Imports no module of the service.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.worker import Turn, prompt, serve

WARM = 4  # steps before the clock runs


class Llama:
    """A model; each turn gets a context of its own, just large enough, as llama.cpp's own benchmark does."""

    def __init__(self, gguf: str, threads: int) -> None:
        # Only in that environment, and without types.
        self.api: Any = importlib.import_module("llama_cpp.llama_cpp")
        self.numpy: Any = importlib.import_module("numpy")
        self.threads = threads
        self.api.llama_backend_init()
        self.model = self.api.llama_model_load_from_file(gguf.encode(), self.api.llama_model_default_params())
        if not self.model:
            raise OSError(f"llama.cpp cannot load {gguf}")
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))

    def facts(self) -> Turn:
        """version, what it was built for, bytes of weights that a step reads."""
        build = self.api.llama_print_system_info().decode().strip()
        return {"version": importlib.metadata.version("llama-cpp-python"), "build": build,
                "weights": self.api.llama_model_size(self.model)}  # fmt: skip

    def decode(self, rows: int, context: int, steps: int) -> Turn:
        """seconds: of each step over `rows` sequences that hold `context` tokens at first; cpu: of all of them."""
        with self._context(rows, context + steps + WARM) as running:
            running.feed([(0, place, token, False) for place, token in enumerate(prompt(0, context))])
            running.copy_first(rows)
            tokens, times = [1] * rows, []
            for step in range(steps + WARM):
                if step == WARM:
                    cpu = time.process_time()
                begin = time.perf_counter()
                running.feed([(row, context + step, token, True) for row, token in enumerate(tokens)])
                tokens = running.best(rows)
                times.append(time.perf_counter() - begin)
            return {"seconds": times[WARM:], "cpu": time.process_time() - cpu}

    def prefill(self, tokens: int) -> Turn:
        """seconds: from a prompt of `tokens` to the first new token; cpu: the same."""
        with self._context(1, tokens + 1) as running:
            begin, cpu = time.perf_counter(), time.process_time()
            running.feed([(0, place, token, place == tokens - 1) for place, token in enumerate(prompt(0, tokens))])
            running.best(1)
            return {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}

    @contextmanager
    def _context(self, rows: int, length: int) -> Iterator[_Running]:
        chosen = self.api.llama_context_default_params()
        length = -(-length // 256) * 256
        chosen.n_ctx, chosen.n_seq_max, chosen.n_batch = rows * length, rows, max(2048, length)
        chosen.n_threads = chosen.n_threads_batch = self.threads
        chosen.kv_unified = False  # what llama.cpp advises for sequences that share no prefix
        context = self.api.llama_init_from_model(self.model, chosen)
        batch = self.api.llama_batch_init(chosen.n_batch, 0, 1)
        try:
            yield _Running(self, context, batch)
        finally:
            self.api.llama_batch_free(batch)
            self.api.llama_free(context)


class _Running:
    """A context and the batch that feeds it."""

    def __init__(self, owner: Llama, context: Any, batch: Any) -> None:
        self._owner, self._context, self._batch = owner, context, batch

    def feed(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Compute these (sequence, position, token, whether its logits are wanted) together."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (row, place, token, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if code := self._owner.api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode: {code}")

    def copy_first(self, rows: int) -> None:
        """Let `rows` sequences hold what the first one holds, each in a copy of its own."""
        memory = self._owner.api.llama_get_memory(self._context)
        for row in range(1, rows):
            self._owner.api.llama_memory_seq_cp(memory, 0, row, -1, -1)

    def best(self, rows: int) -> list[int]:
        """The most likely token of each of the last wanted logits; waits for them."""
        logits = self._owner.api.llama_get_logits(self._context)
        shaped = self._owner.numpy.ctypeslib.as_array(logits, shape=(rows, self._owner.vocabulary))
        found: list[int] = shaped.argmax(1).tolist()
        return found


def main() -> None:
    llama = Llama(sys.argv[1], int(sys.argv[2]))
    serve({"facts": llama.facts, "decode": llama.decode, "prefill": llama.prefill})


if __name__ == "__main__":
    main()
