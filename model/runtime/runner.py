"""The torch half of the engine: computes prompts and steps of the batches it is given. One thread makes and uses it."""

import gc
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from model.engine.blocks import Copy, blocks_for
from model.engine.scheduler import Work
from model.runtime.kv import Batch, BlockCache, KvBlocks, KvShape
from model.runtime.layers import is_packed, look_up_positions, replace_layers, use_whole_context
from model.runtime.linear import FEW, Plan
from model.runtime.sampler import Rules, choose, choose_by_kernel
from model.types import Sampling

if TYPE_CHECKING:
    from model.runtime.compile import ThreadCompiler

_log = logging.getLogger(__name__)

_GUESSES = 7  # tokens that a row may guess, which are read with the one that is known

Step = Callable[..., Tensor]  # what `make_step` returns, as it is, compiled or recorded


class Bucket(NamedTuple):
    """What a compiled step is for: so many tokens, of which one sequence has `longest` at most (1, or all of them)."""

    tokens: int
    longest: int


def make_step(longest: int) -> Step:
    """The decode step of transformers' modules.

    step(model, keys, values, tokens, tables, spans, *rules) -> the token after each, int64 [n] (see sampler.choose).
    Writes the KV of its tokens and marks what it chose as seen, last of all, so that it can be tried again.
    """

    def step(
        model: nn.Module, keys: list[Tensor], values: list[Tensor], tokens: Tensor, tables: Tensor, spans: Tensor,
        *rules: Tensor,
    ) -> Tensor:  # fmt: skip
        states = hidden(model, (keys, values), Batch(tokens, tables, spans, longest))
        return choose(model.lm_head(states).float(), tokens[1], tokens[2], Rules(*rules))

    return step


def hidden(model: nn.Module, kv: tuple[list[Tensor], list[Tensor]], batch: Batch) -> Tensor:
    """The last hidden states of transformers' modules, [n, hidden], for the n tokens of a batch."""
    ids, positions = batch.tokens[None, 0], batch.tokens[None, 1]
    cache = BlockCache(kv, batch.places)
    made = model.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, batch=batch)
    return made.last_hidden_state[0]


class Runner:
    """A loaded model over KV blocks. A call that raises has changed nothing that matters, and may be repeated."""

    def __init__(
        self, model: nn.Module, plan: Plan, slots: int, blocks: int, context: int, device: str, eos: frozenset[int],
        guesses: int = _GUESSES,
    ) -> None:  # fmt: skip
        """slots: rows that run at once; blocks: of KV, for all; context: tokens of one sequence at most."""
        use_whole_context(model, context)
        look_up_positions(model, context, plan.dtype, device)
        replace_layers(model, plan)
        self.model, self.plan, self.device, self.eos = model, plan, device, eos
        self.slots, self.blocks, self.context, self.guesses = slots, blocks, context, guesses
        self.step_tokens = slots * (1 + guesses) if device == "cpu" else max(slots, FEW)
        self.chunk_tokens = 512 if device == "cpu" else 2048
        self.kv = KvBlocks(KvShape.of(model.config, plan.kv), blocks, device, plan.kernels)
        self.rules = Rules.empty(slots + 1, model.config.vocab_size, device)  # the last is of what fills a bucket up
        self.compiler: ThreadCompiler | None = None
        self.compiled: dict[Bucket, Step] = {}
        self._batches: dict[Bucket, Batch] = {}
        self._layers = [layer.forward for layer in model.model.layers]
        self._broken = 0  # compiled code that was given up
        self._facts: dict[str, str | int | bool] = {
            "device": device,
            "linear_backend": plan.linear_backend,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "slots": slots,
            "context": context,
            "kv_bytes": self.kv.bytes,
            "kv_bytes_per_token": self.kv.shape.bytes_per_token,
            "deterministic": is_packed(model),
        }

    @torch.inference_mode()
    def begin(self, row: int, sampling: Sampling, seed: int, tokens: Sequence[int]) -> None:
        """Give a row to a request. tokens: of its prompt and, where it goes on, of its answer."""
        self.rules.assign(row, sampling, seed, torch.tensor(tokens, dtype=torch.int64, device=self.device))

    @torch.inference_mode()
    def prefill(self, work: Sequence[Work]) -> list[bool]:
        """Compute the KV of these tokens; whether each sequence's numbers are all finite."""
        finite = self.hidden_states(Batch.of(work)).isfinite().all(-1).tolist()
        return [all(part) for part in _parts(finite, work)]

    @torch.inference_mode()
    def step(self, work: Sequence[Work]) -> list[list[int | None]]:
        """The token after each of these; None where the model's numbers were not finite."""
        chosen = (self._step_by_kernels if self.plan.kernels else self._step_by_torch)(work).tolist()
        return _parts([token if token >= 0 else None for token in chosen], work)

    def _step_by_kernels(self, work: Sequence[Work]) -> Tensor:
        batch = Batch.of(work)
        logits = self.model.lm_head(self.hidden_states(batch))
        return choose_by_kernel(logits, batch.tokens[1], batch.tokens[2], self.rules)

    def _step_by_torch(self, work: Sequence[Work]) -> Tensor:
        tokens, longest = sum(len(one.tokens) for one in work), max(len(one.tokens) for one in work)
        fitting = [b for b in self.compiled if b.tokens >= tokens and b.longest >= longest]
        if not fitting:
            return self._eager(work)
        bucket = min(fitting)
        try:
            return self.compiled[bucket](*self.arguments(self.fill(bucket, work)))[:tokens]
        except Exception as error:  # it is given up where eager code does not fail; else the rows are to blame
            chosen = self._eager(work)
            _log.warning("compiled code failed, continuing without it", exc_info=error)
            del self.compiled[bucket]
            self._broken += 1
            return chosen

    def _eager(self, work: Sequence[Work]) -> Tensor:
        batch = Batch.of(work).to(self.device)
        return make_step(batch.longest)(*self.arguments(batch))

    def padded(self, bucket: Bucket, work: Sequence[Work] = ()) -> Batch:
        """A batch of a bucket's shape, on the CPU: this work, and tokens that are nobody's."""
        missing = bucket.tokens - sum(len(one.tokens) for one in work)
        whole = [*work, *[Work(self.slots, [0], 0, [0])] * missing]
        return Batch.of(whole, bucket.tokens, blocks_for(self.context))._replace(longest=bucket.longest)

    def fill(self, bucket: Bucket, work: Sequence[Work] = ()) -> Batch:
        """The tensors that a bucket's recorded step reads, always the same ones, with this work in them."""
        batch = self.padded(bucket, work)
        if bucket not in self._batches:
            self._batches[bucket] = batch.to(self.device)
        for mine, new in zip(self._batches[bucket][:-1], batch[:-1], strict=True):
            mine.copy_(new)
        return self._batches[bucket]

    def arguments(self, batch: Batch) -> tuple[object, ...]:
        """What a step of this batch is called with."""
        return self.model, *self.kv.tensors, batch.tokens, batch.tables, batch.spans, *self.rules.tensors()

    def hidden_states(self, batch: Batch) -> Tensor:
        """The last hidden states, as the head takes them: [n, hidden]."""
        if not self.plan.kernels:
            return hidden(self.model, self.kv.tensors, batch.to(self.device))
        body = self.model.model
        x = body.embed_tokens(batch.tokens[0])
        cos, sin = (table[:, 0] for table in body.rotary_emb(x, batch.tokens[1][:, None]))
        for layer, keys, values in zip(self._layers, *self.kv.tensors, strict=True):
            x = layer(x, cos, sin, keys, values, batch.tables, batch.tokens)
        return x

    @torch.inference_mode()
    def copy(self, copy: Copy) -> None:
        self.kv.copy(copy)

    @torch.inference_mode()
    def clear(self, blocks: Sequence[int]) -> None:
        self.kv.clear(blocks)

    @torch.inference_mode()
    def load_compiled(self, idle: bool) -> bool:
        """Take over compiled code if some has become ready; returns whether. idle: nobody waits meanwhile."""
        found = self.compiler.poll(idle) if self.compiler else None
        if found:
            self.compiled[found[0]] = found[1]
            gc.freeze()  # it is many objects that stay, as those of the load (local.py)
        return found is not None

    def compile_state(self) -> tuple[int, int]:
        """How many buckets are served by compiled code, and how many stay eager because compiling failed."""
        compiler = self.compiler
        uncompiled, failed = (len(compiler.uncompiled), compiler.failed) if compiler else (0, 0)
        return len(self.compiled) - uncompiled, self._broken + failed

    def close(self) -> None:
        """Stop what runs beside the model thread, and free the memory. Nothing else may be called afterwards."""
        if self.compiler:
            self.compiler.close()
        self.compiler = None  # it holds the model, too
        del self.model, self.kv, self.rules, self._batches, self._layers
        self.compiled.clear()
        gc.unfreeze()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def details(self) -> dict[str, str | int]:
        """What /readyz tells about the engine; touches no tensor, for other threads ask."""
        (done, failures), compiler = self.compile_state(), self.compiler
        wanted = len(compiler.wanted) if compiler else 0
        return self._facts | {"compiled": f"{done}/{wanted}", "compile_failures": failures}


def _parts(values: list[Any], work: Sequence[Work]) -> list[list[Any]]:
    """What belongs to each sequence, of what was computed for all tokens."""
    flat = iter(values)
    return [list(itertools.islice(flat, len(one.tokens))) for one in work]
