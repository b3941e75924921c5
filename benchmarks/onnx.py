"""onnxruntime-genai's bare step over its own int4 export, as a worker in that package's own environment.

    python -m benchmarks.onnx FOLDER THREADS

Does not export: peers.py does, from the dense weights. Imports no module of the service.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.worker import Turn, prompt, serve

WARM = 4  # steps before the clock runs


class Onnx:
    """A model; each turn gets a generator of its own."""

    def __init__(self, folder: Path, threads: int) -> None:
        # Only in that environment, and without types.
        self.api: Any = importlib.import_module("onnxruntime_genai")
        self.numpy: Any = importlib.import_module("numpy")
        file = folder / "genai_config.json"
        config = json.loads(file.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        file.write_text(json.dumps(config))
        self.folder = folder
        self.model = self.api.Model(str(folder))

    def facts(self) -> Turn:
        """version, and the bytes of weights that a step reads (the whole export)."""
        size = sum(file.stat().st_size for file in self.folder.glob("*.onnx*"))
        return {"version": importlib.metadata.version("onnxruntime-genai"), "weights": size}

    def decode(self, rows: int, context: int, steps: int) -> Turn:
        """seconds: of each step over `rows` sequences that hold `context` tokens at first; cpu: of all of them."""
        running, times = self._generator(rows, context, context + steps + WARM + 2), []
        running.generate_next_token()  # the choice after the prompt
        for step in range(steps + WARM):
            if step == WARM:
                cpu = time.process_time()
            begin = time.perf_counter()
            running.generate_next_token()
            times.append(time.perf_counter() - begin)
        return {"seconds": times[WARM:], "cpu": time.process_time() - cpu}

    def prefill(self, tokens: int) -> Turn:
        """seconds: from a prompt of `tokens` to the first new token; cpu: the same."""
        begin, cpu = time.perf_counter(), time.process_time()
        self._generator(1, tokens, tokens + 2).generate_next_token()
        return {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}

    def _generator(self, rows: int, context: int, length: int) -> Any:
        chosen = self.api.GeneratorParams(self.model)
        # min_length: no sequence ends early, whatever it says.
        chosen.set_search_options(batch_size=rows, max_length=length, min_length=length, do_sample=False)
        generator = self.api.Generator(self.model, chosen)
        ids = [prompt(row, context) for row in range(rows)]
        generator.append_tokens(self.numpy.array(ids, dtype=self.numpy.int32))
        return generator


def main() -> None:
    onnx = Onnx(Path(sys.argv[1]), int(sys.argv[2]))
    serve({"facts": onnx.facts, "decode": onnx.decode, "prefill": onnx.prefill})


if __name__ == "__main__":
    main()
