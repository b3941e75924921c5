"""The torch half of the engine: prefill a chunk, step a batch, swap two slots.

Decides nothing: whom to serve, when to stop and what a token means is the engine's. One thread makes it and uses it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from model.engine.protocol import Chunk
from model.runtime.attention import NAME as ATTENTION
from model.runtime.attention import attend_by_kernel, look_up_positions
from model.runtime.kv import ChunkCache, KvPages, KvShape, pages_for
from model.runtime.linear import Plan, install
from model.runtime.sampler import Rows, choose_unfiltered
from model.runtime.step import Step, advance, advance_by_kernel, hidden, make_step, prefill
from model.types import Sampling

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A decode step's fixed shape: the first `rows` slots over the first `pages` pages."""

    rows: int
    pages: int

    def covers(self, other: Bucket) -> bool:
        return self.rows >= other.rows and self.pages >= other.pages


PREFILL = Bucket(0, 0)  # no decode step, and covers none: a chunk of any number of tokens


class CompileState(NamedTuple):
    """How many buckets are wanted, how many stay eager, and how many serve uncompiled though `poll` gave a step."""

    wanted: int
    failed: int
    as_is: int = 0


class Compiler(Protocol):
    """Where compiled steps come from (compile.py)."""

    def poll(self, idle: bool) -> tuple[Bucket, Step] | None:
        """A step that has become available since the last call, or None. Takes its time only when `idle`."""

    def state(self) -> CompileState: ...

    def close(self) -> None:
        """Stop what runs beside the model thread."""


class Runner:
    """A loaded model over KV slots.

    Raises whatever torch raises; a failed `step` has changed no row's state and may be tried again.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, slots: int, context: int, device: str, eos: frozenset[int]
    ) -> None:
        install(model, plan)
        look_up_positions(model, context, plan.dtype, device)
        if plan.kernels:
            attend_by_kernel(model)
        model.set_attn_implementation(ATTENTION)
        self.model, self.plan, self.device, self.eos = model, plan, device, eos
        self.slots, self.context = slots, context
        self.kv = KvPages(KvShape.of(model.config, plan.kv), slots, context, device)
        self.rows = Rows.empty(slots, model.config.vocab_size, device)
        self.compiler: Compiler | None = None
        self.compiled: dict[Bucket, Step] = {}
        self._views = {count: self.rows.first(count) for count in range(1, slots + 1)}
        self._unfiltered: set[int] = set()
        self._active: tuple[int, ...] = ()
        self._broken = 0  # compiled steps that were given up
        self._facts: dict[str, str | int] = {
            "device": device,
            "product": plan.product,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "slots": slots,
            "context": context,
            "kv_bytes": self.kv.bytes,
            "kv_bytes_per_token": self.kv.shape.bytes_per_token,
        }

    @torch.inference_mode()
    def begin(self, slot: int, sampling: Sampling, seed: int, prompt: Sequence[int]) -> None:
        """Give `slot` to a request. Its row stays idle until `arm`."""
        self.rows.assign(slot, sampling, seed, torch.tensor(prompt, dtype=torch.int64, device=self.device))
        unfiltered = sampling.temperature > 0 and sampling.top_k == 0 and sampling.top_p >= 1 and not self.plan.kernels
        (self._unfiltered.add if unfiltered else self._unfiltered.discard)(slot)

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk]) -> list[bool]:
        """Compute the KV of these chunks, of different slots; whether each one's numbers are all finite."""
        if self.plan.kernels:
            return self._prefill_together(chunks)
        return [self._prefill_alone(*chunk) for chunk in chunks]

    def _prefill_together(self, chunks: Sequence[Chunk]) -> list[bool]:
        ids = torch.tensor([token for _, tokens, _ in chunks for token in tokens])
        slot = torch.tensor([slot for slot, tokens, _ in chunks for _ in tokens])
        position = torch.cat([torch.arange(start, start + len(tokens)) for _, tokens, start in chunks])
        finite = self._try(PREFILL if len(ids) > 1 else None, prefill, *self.kv.tensors, ids, slot, position)
        for index, tokens, start in chunks:
            self.rows.position[index] = start + len(tokens)
        return [bool(part.all()) for part in finite.split([len(tokens) for _, tokens, _ in chunks])]

    def _prefill_alone(self, slot: int, ids: Sequence[int], start: int) -> bool:
        cache = ChunkCache(self.kv, slot, start, len(ids))
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        self.rows.position[slot] = start + len(ids)
        tokens = torch.tensor([ids], dtype=torch.int64, device=self.device)
        return bool(hidden(self.model, cache, tokens, positions).isfinite().all())

    @torch.inference_mode()
    def arm(self, slot: int, token: int, position: int) -> None:
        """Let the next step of `slot` read `token` at `position`."""
        self.rows.ids[slot, 0] = token
        self.rows.position[slot] = position

    @torch.inference_mode()
    def idle(self, slot: int, position: int) -> None:
        """Take `slot` out of the batch. Its row may still be computed: it writes at `position`, which none reads."""
        self.rows.position[slot] = min(position, self.context - 1)

    @torch.inference_mode()
    def step(self, active: Sequence[int]) -> list[int | None]:
        """The next token of each slot, by index; None where the model's numbers were not finite.

        At least as many as the last of `active`, which alone advance; the others' entries mean nothing.
        """
        self._activate(tuple(active))
        pages = 1 if self.plan.kernels else pages_for(int(self.rows.position[list(active)].max()) + 1)
        rows, (tokens, finite, logits) = self._computed(Bucket(max(active) + 1, pages))
        if not self._unfiltered.isdisjoint(active):
            free = (rows.temperature > 0) & (rows.top_k == 0) & (rows.top_p >= 1)
            tokens = torch.where(free, choose_unfiltered(logits, rows), tokens)
        (advance_by_kernel if self.plan.kernels else advance)(rows, tokens, finite)
        return [token if ok else None for token, ok in zip(tokens.tolist(), finite.tolist(), strict=True)]

    def step_over(self, pages: int) -> Step:
        """The decode step for a bucket of so many pages, not compiled."""
        return make_step(None if self.plan.kernels else pages)

    @torch.inference_mode()
    def swap(self, a: int, b: int, tokens: int) -> None:
        """Exchange two slots, whose KV is written up to `tokens` positions at most."""
        self.kv.swap(a, b, tokens)
        self.rows.swap(a, b)
        moved = {a: b, b: a}
        self._unfiltered = {moved.get(slot, slot) for slot in self._unfiltered}
        self._active = ()

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Wipe the KV of a slot whose numbers went wrong."""
        self.kv.clear(slot)

    @torch.inference_mode()
    def adopt(self, idle: bool) -> bool:
        """Take over one compiled step if there is a new one; returns whether. idle: nobody waits meanwhile."""
        found = self.compiler.poll(idle) if self.compiler else None
        if found:
            self.compiled[found[0]] = found[1]
            gc.freeze()  # a step is many objects that stay, as those of the load (local.py)
        return found is not None

    def compile_state(self) -> tuple[int, int]:
        """How many compiled steps are in use, and how many buckets stay eager because compiling failed."""
        state = self._compile_state()
        return len(self.compiled) - state.as_is, self._broken + state.failed

    def _compile_state(self) -> CompileState:
        return self.compiler.state() if self.compiler else CompileState(0, 0)

    def close(self) -> None:
        """Stop what runs beside the model thread, and free the memory. Nothing else may be called afterwards."""
        if self.compiler:
            self.compiler.close()
        self.compiler = None  # it holds the model, too
        del self.model, self.kv, self.rows, self._views
        self.compiled.clear()
        gc.unfreeze()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def details(self) -> dict[str, str | int]:
        """What /readyz tells about the engine; touches no tensor, for other threads ask."""
        steps, failures = self.compile_state()
        return self._facts | {"compiled": f"{steps}/{self._compile_state().wanted}", "compile_failures": failures}

    def _activate(self, active: tuple[int, ...]) -> None:
        if active != self._active:
            self.rows.active.fill_(False)
            self.rows.active[list(active)] = True
            self._active = active

    def _computed(self, need: Bucket) -> tuple[Rows, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The step over `need`, compiled where a bucket covers it; and the rows it was computed for."""
        bucket = min((bucket for bucket in self.compiled if bucket.covers(need)), default=None)
        rows = self._views[(bucket or need).rows]
        return rows, self._try(bucket, self.step_over(need.pages), *self.kv.tensors, *rows.tensors())

    def _try(self, bucket: Bucket | None, eager: Callable[..., Any], *arguments: object) -> Any:
        """What `bucket`'s compiled code computes; or `eager`, where there is none.

        When compiled code fails where eager code does not, it is given up; when both fail, the rows are to blame.
        """
        compiled = self.compiled.get(bucket) if bucket else None
        if compiled is None:
            return eager(self.model, *arguments)
        try:
            return compiled(self.model, *arguments)
        except Exception as error:
            outcome = eager(self.model, *arguments)
            _log.warning("compiled code failed and is given up for the eager one", exc_info=error)
            del self.compiled[bucket]
            self._broken += 1
            return outcome
