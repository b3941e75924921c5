"""llama.cpp's bare step through llama-cpp-python's low-level batch, as a worker in that package's own environment.

    python -m benchmarks.llama MODEL.gguf THREADS

Leaves out everything above llama_decode but greedy choice, as the other side does. Imports no module of the service.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import time
from typing import Any

from benchmarks.worker import Turn, prompt, serve

WARM = 4  # steps before the clock runs


class Llama:
    """A model; contexts are just as large as a turn needs, as in llama.cpp's own benchmark."""

    def __init__(self, gguf: str, threads: int) -> None:
        # Only in that environment, and without types.
        self.api: Any = importlib.import_module("llama_cpp.llama_cpp")
        self.numpy: Any = importlib.import_module("numpy")
        self.threads = threads
        self._held: tuple[tuple[int, int, int], _Running] | None = None  # for rows, context, steps
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
        running, tokens, times = self._holding(rows, context, steps + WARM), [1] * rows, []
        for step in range(steps + WARM):
            if step == WARM:
                cpu = time.process_time()
            begin = time.perf_counter()
            running.feed([(row, context + step, token, True) for row, token in enumerate(tokens)])
            tokens = running.best(rows)
            times.append(time.perf_counter() - begin)
        return {"seconds": times[WARM:], "cpu": time.process_time() - cpu}

    def _holding(self, rows: int, context: int, steps: int) -> _Running:
        """Sequences that hold `context` tokens each; those of the turn before are cut back where they fit."""
        if self._held is None or self._held[0] != (rows, context, steps):
            if self._held:
                self._held[1].close()
            running = _Running(self, rows, context + steps)
            running.feed([(0, place, token, False) for place, token in enumerate(prompt(0, context))])
            running.copy_first(rows)
            self._held = ((rows, context, steps), running)
        self._held[1].cut(rows, context)
        return self._held[1]

    def prefill(self, tokens: int) -> Turn:
        """seconds: from a prompt of `tokens` to the first new token; cpu: the same."""
        running = _Running(self, 1, tokens + 1)
        begin, cpu = time.perf_counter(), time.process_time()
        running.feed([(0, place, token, place == tokens - 1) for place, token in enumerate(prompt(0, tokens))])
        running.best(1)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        running.close()
        return {"seconds": seconds, "cpu": cpu}


class _Running:
    """A context of `rows` sequences of up to `length` tokens, and the batch that feeds it."""

    def __init__(self, owner: Llama, rows: int, length: int) -> None:
        chosen = owner.api.llama_context_default_params()
        length = -(-length // 256) * 256
        chosen.n_ctx, chosen.n_seq_max, chosen.n_batch = rows * length, rows, max(2048, length)
        chosen.n_threads = chosen.n_threads_batch = owner.threads
        chosen.kv_unified = False  # what llama.cpp advises for sequences that share no prefix
        self._owner = owner
        self._context = owner.api.llama_init_from_model(owner.model, chosen)
        self._batch = owner.api.llama_batch_init(chosen.n_batch, 0, 1)

    def close(self) -> None:
        self._owner.api.llama_batch_free(self._batch)
        self._owner.api.llama_free(self._context)

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

    def cut(self, rows: int, length: int) -> None:
        """Let sequences forget everything from position `length` on."""
        memory = self._owner.api.llama_get_memory(self._context)
        for row in range(rows):
            self._owner.api.llama_memory_seq_rm(memory, row, length, -1)

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
