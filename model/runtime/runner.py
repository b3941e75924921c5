"""The torch half of the engine: prefill a chunk, step a batch, swap two slots. One thread makes it and uses it."""

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from model.engine.scheduler import Chunk
from model.runtime.attention import ATTENTION, look_up_positions, use_kernels
from model.runtime.kv import PAGE, KvPages, KvShape, SlotCache, pages_for
from model.runtime.linear import Plan, dequantise
from model.runtime.sampler import Rows, advance, choose, choose_by_kernel, choose_unfiltered
from model.types import Sampling

if TYPE_CHECKING:
    from model.runtime.compile import ThreadCompiler

_log = logging.getLogger(__name__)

Step = Callable[..., Any]  # what `make_step` returns, as it is, compiled or recorded


class Bucket(NamedTuple):
    """What a compiled step is for: the first `rows` slots, and `pages` pages of columns."""

    rows: int
    pages: int


def make_step(pages: int) -> Step:
    """The decode step of transformers' modules and PyTorch's attention over `pages` pages of columns.

    step(model, keys, values, *rows) -> tokens int64 [rows], finite bool [rows], logits float32 [rows, vocabulary].
    Writes one token's KV a row and changes nothing else, so that it can be tried again.
    """

    def step(model: nn.Module, keys: list[Tensor], values: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        rows = Rows(*tensors)
        positions = rows.position[:, None]
        cache = SlotCache((keys, values), 0, positions, pages * PAGE)
        logits = model.lm_head(hidden(model, cache, rows.ids, positions))[:, -1].float()
        return choose(logits, rows), logits.isfinite().all(-1), logits

    return step


def hidden(model: nn.Module, cache: SlotCache, ids: Tensor, positions: Tensor) -> Tensor:
    """The last hidden state of transformers' modules, [rows, n, hidden], after ids at positions, both [rows, n]."""
    return model.model(
        input_ids=ids, position_ids=positions, past_key_values=cache, attention_mask=cache.mask(), use_cache=True
    ).last_hidden_state


class Runner:
    """A loaded model over KV slots. A `step` that raises has changed no row's state and may be tried again."""

    def __init__(
        self, model: nn.Module, plan: Plan, slots: int, context: int, device: str, eos: frozenset[int]
    ) -> None:
        look_up_positions(model, context, plan.dtype, device)
        if plan.kernels:
            use_kernels(model, plan)
        else:
            model.set_attn_implementation(ATTENTION)
            if plan.linear_backend == "dense":
                dequantise(model, plan.dtype)
        self.model, self.plan, self.device, self.eos = model, plan, device, eos
        self.slots, self.context = slots, context
        self.kv = KvPages(KvShape.of(model.config, plan.kv), slots, context, device, whole=not plan.kernels)
        self.rows = Rows.empty(slots, model.config.vocab_size, device)
        self.compiler: ThreadCompiler | None = None
        self.compiled: dict[Bucket, Step] = {}
        self._layers = [layer.forward for layer in model.model.layers]
        self._views = {count: self.rows.first(count) for count in range(1, slots + 1)}
        self._slots = torch.arange(slots, device=device)
        self._unfiltered: set[int] = set()
        self._active: tuple[int, ...] = ()
        self._broken = 0  # compiled code that was given up
        self._facts: dict[str, str | int] = {
            "device": device,
            "linear_backend": plan.linear_backend,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "slots": slots,
            "context": context,
            "kv_bytes": self.kv.bytes,
            "kv_bytes_per_token": self.kv.shape.bytes_per_token,
        }

    @torch.inference_mode()
    def init_row(self, slot: int, sampling: Sampling, seed: int, prompt: Sequence[int]) -> None:
        """Give `slot` to a request. Its row stays out of the batch until `activate`."""
        self.rows.assign(slot, sampling, seed, torch.tensor(prompt, dtype=torch.int64, device=self.device))
        unfiltered = sampling.temperature > 0 and sampling.top_k == 0 and sampling.top_p >= 1 and not self.plan.kernels
        (self._unfiltered.add if unfiltered else self._unfiltered.discard)(slot)

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk]) -> list[bool]:
        """Compute the KV of these chunks, of different slots; whether each one's numbers are all finite."""
        prefilled = self._prefill_together(chunks) if self.plan.kernels else [self._prefill_alone(*c) for c in chunks]
        for slot, tokens, start in chunks:
            self.rows.position[slot] = start + len(tokens)
        return prefilled

    def _prefill_together(self, chunks: Sequence[Chunk]) -> list[bool]:
        ids = torch.tensor([token for _, tokens, _ in chunks for token in tokens])
        slot = torch.tensor([slot for slot, tokens, _ in chunks for _ in tokens])
        position = torch.cat([torch.arange(start, start + len(tokens)) for _, tokens, start in chunks])
        finite = self.hidden_states(ids, slot, position, position).isfinite().all(-1)
        return [bool(part.all()) for part in finite.split([len(tokens) for _, tokens, _ in chunks])]

    def _prefill_alone(self, slot: int, ids: Sequence[int], start: int) -> bool:
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        cache = SlotCache(self.kv.tensors, slot, positions, start + len(ids))
        tokens = torch.tensor([ids], dtype=torch.int64, device=self.device)
        return bool(hidden(self.model, cache, tokens, positions).isfinite().all())

    @torch.inference_mode()
    def activate(self, slot: int, token: int, position: int) -> None:
        """Let the next step of `slot` read `token` at `position`."""
        self.rows.ids[slot, 0] = token
        self.rows.position[slot] = position

    @torch.inference_mode()
    def deactivate(self, slot: int, position: int) -> None:
        """Take `slot` out of the batch. Its row may still be computed: it writes at `position`, which none reads."""
        self.rows.position[slot] = min(position, self.context - 1)

    @torch.inference_mode()
    def step(self, active: Sequence[int]) -> list[int | None]:
        """The next token of each slot, by index; None where the model's numbers were not finite.

        At least as many as the last of `active`, which alone advance; the others' entries mean nothing.
        """
        if tuple(active) != self._active:
            self._active = tuple(active)
            self.rows.active.fill_(False)
            self.rows.active[list(active)] = True
        return (self._step_by_kernels if self.plan.kernels else self._step_by_torch)(active)

    def _step_by_kernels(self, active: Sequence[int]) -> list[int | None]:
        rows = self._views[max(active) + 1]
        slot, last = self._slots[: len(rows.position)], torch.where(rows.active, rows.position, 0)
        states = self.hidden_states(rows.ids[:, 0], slot, rows.position, last)
        logits = self.model.lm_head(self.model.model.norm(states))
        tokens = choose_by_kernel(logits, rows)
        torch.ops.slots.advance(rows.ids, rows.position, rows.active, rows.seen, tokens)
        return [token if token >= 0 else None for token in tokens.tolist()]

    def _step_by_torch(self, active: Sequence[int]) -> list[int | None]:
        need = Bucket(max(active) + 1, pages_for(int(self.rows.position[list(active)].max()) + 1))
        bucket = min((b for b in self.compiled if b.rows >= need.rows and b.pages >= need.pages), default=need)
        rows = self._views[bucket.rows]
        eager = make_step(need.pages)
        tokens, finite, logits = self._try(bucket, eager, self.model, *self.kv.tensors, *rows.tensors())
        if not self._unfiltered.isdisjoint(active):
            free = (rows.temperature > 0) & (rows.top_k == 0) & (rows.top_p >= 1)
            tokens = torch.where(free, choose_unfiltered(logits, rows), tokens)
        advance(rows, tokens, finite)
        return [token if ok else None for token, ok in zip(tokens.tolist(), finite.tolist(), strict=True)]

    def hidden_states(self, ids: Tensor, slot: Tensor, position: Tensor, last: Tensor) -> Tensor:
        """The last hidden states by this project's kernels, before the last norm: [n, hidden]."""
        body = self.model.model
        x = body.embed_tokens(ids)
        cos, sin = (table[:, 0] for table in body.rotary_emb(x, position[:, None]))
        for layer, keys, values in zip(self._layers, *self.kv.tensors, strict=True):
            x = layer(x, cos, sin, keys, values, slot, position, last)
        return x

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
        """Zero the KV of a slot whose numbers went wrong: a masked NaN is still NaN."""
        for tensor in (*self.kv.keys, *self.kv.values):
            tensor[:, slot] = 0

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
        del self.model, self.kv, self.rows, self._views, self._layers
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

    def _try(self, bucket: Bucket, eager: Step, *arguments: object) -> Any:
        """What `bucket`'s compiled code computes; or `eager`, where there is none.

        When compiled code fails where eager code does not, it is given up; when both fail, the rows are to blame.
        """
        if bucket not in self.compiled:
            return eager(*arguments)
        try:
            return self.compiled[bucket](*arguments)
        except Exception as error:
            outcome = eager(*arguments)
            _log.warning("compiled code failed, continuing without it", exc_info=error)
            del self.compiled[bucket]
            self._broken += 1
            return outcome
