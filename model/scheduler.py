"""The running batch: who is in it, what is computed next, and how each one leaves.

Belongs to the model thread. Imports no torch and knows neither the queue before it nor the text after it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from typing import Protocol

from model.sequence import Finished, Sequence
from model.slots import Slot, SlotTable
from model.types import FinishReason, GenerationFailed, InvalidRequest, Sampling, ServiceError
from telemetry import Metrics

_log = logging.getLogger(__name__)

# Prompt tokens computed between two steps: while others stream, a chunk is a pause for them; alone, larger is faster.
CHUNK_BESIDE_STREAMS = 64
CHUNK_ALONE = 512
_LOOK_EVERY = 1.0  # seconds between two looks for a step that was compiled meanwhile
_BARREN = 8  # steps that fail in a row for one sequence after another: then it is the engine that is broken
_SMOOTHING = 0.1  # of the tokens/s estimate, per step


class Runner(Protocol):
    """What computes (runner.py, or a torch-free stand-in in tests). Slots are named by their index."""

    slots: int
    context: int
    eos: frozenset[int]

    def begin(self, slot: int, sampling: Sampling, seed: int, prompt: List[int]) -> None: ...
    def prefill(self, slot: int, ids: List[int], start: int) -> bool: ...
    def arm(self, slot: int, token: int, position: int) -> None: ...
    def idle(self, slot: int, position: int) -> None: ...
    def step(self, active: List[int]) -> List[int | None]: ...
    def swap(self, a: int, b: int, tokens: int) -> None: ...
    def clear(self, slot: int) -> None: ...
    def adopt(self, idle: bool) -> bool: ...
    def compile_state(self) -> tuple[int, int]: ...
    def close(self) -> None: ...
    def details(self) -> Mapping[str, str | int]: ...


class Batch:
    """The sequences that hold a slot. `speed` is tokens a second over all of them; `steps` counts the good ones."""

    def __init__(self, runner: Runner, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.runner, self._metrics, self._clock = runner, metrics, clock
        self.running: list[Sequence] = []
        self.speed = 50.0  # a first guess; the first steps correct it
        self.steps = 0
        self._table = SlotTable(runner.slots)
        self._looked = clock()
        self._compile_failures = self._barren = 0
        metrics.slots.set(runner.slots)
        metrics.kv_bytes.set(float(runner.details().get("kv_bytes", 0)))

    @property
    def full(self) -> bool:
        """Whether all slots are taken."""
        return len(self.running) >= self.runner.slots

    def admit(self, sequence: Sequence) -> None:
        """Give a sequence a slot and the KV it can reuse; one that cannot fit, or cannot begin, is ended.

        Not to be called when the batch is full.
        """
        if len(sequence.prompt) + sequence.request.max_new_tokens > self.runner.context:
            too_long = InvalidRequest("prompt and max_new_tokens exceed the context", param="prompt")
            return sequence.finish(too_long, self._clock())
        sequence.slot = slot = self._table.allocate(sequence.request.owner, sequence.prompt)
        sequence.admitted = self._clock()
        sequence.computed = sequence.cached = len(slot.tokens)
        self.running.append(sequence)
        self._metrics.queue_wait.observe(sequence.admitted - sequence.submitted)
        self._metrics.cached_tokens.inc(sequence.cached)
        self._metrics.running.set(len(self.running))
        try:
            self._begin(sequence, slot)
        except Exception as error:
            self._fail(sequence, error)

    def _begin(self, sequence: Sequence, slot: Slot) -> None:
        seed = sequence.request.sampling.seed
        seed = secrets.randbits(63) if seed is None else seed
        self.runner.begin(slot.index, sequence.request.sampling, seed, sequence.prompt)
        self.runner.idle(slot.index, sequence.computed)
        if sequence.prefilled:
            self._arm(sequence)

    def reap(self) -> None:
        """Let go of those that were closed or ran out of time."""
        now = self._clock()
        for sequence in list(self.running):
            if ending := sequence.ending(now):
                sequence.finish(ending, now)
                self._leave(sequence, keep=True)

    def prefill(self) -> None:
        """Compute one chunk of the oldest prompt that is not complete."""
        sequence = next((s for s in self.running if not s.prefilled), None)
        if sequence is None or sequence.slot is None:
            return
        size = CHUNK_BESIDE_STREAMS if any(s.prefilled for s in self.running) else CHUNK_ALONE
        ids = sequence.prompt[sequence.computed : min(sequence.computed + size, len(sequence.prompt) - 1)]
        try:
            finite = self.runner.prefill(sequence.slot.index, ids, sequence.computed)
        except Exception as error:
            return self._fail(sequence, error)
        if not finite:
            return self._spoiled(sequence)
        sequence.slot.tokens += ids
        sequence.computed += len(ids)
        self._metrics.prompt_tokens.inc(len(ids))
        if sequence.prefilled:
            self._arm(sequence)

    def adopt(self, idle: bool) -> bool:
        """Take over a compiled step that has become available; whether there was one."""
        self._looked = self._clock()
        adopted = self.runner.adopt(idle)
        steps, failures = self.runner.compile_state()
        self._metrics.compiled.set(steps)
        self._metrics.compile_fallbacks.inc(failures - self._compile_failures)
        self._compile_failures = failures
        return adopted

    def step(self) -> None:
        """One token for everyone whose prompt is computed."""
        decoding = [s for s in self.running if s.prefilled]
        if not decoding:
            return
        self._compact()
        before = self._clock()
        if before - self._looked >= _LOOK_EVERY:
            self.adopt(idle=False)
        done = self._compute(decoding)
        now = self._clock()
        if done:
            self.steps += 1
            self.speed += _SMOOTHING * (done / max(now - before, 1e-6) - self.speed)
            self._metrics.tokens_per_second.set(self.speed)
            self._metrics.generated_tokens.inc(done)

    def fail_all(self, error: ServiceError) -> None:
        """End every sequence, without a word to the runner: it may be what failed."""
        while self.running:
            self.running.pop().finish(error, self._clock())
        self._metrics.running.set(0)

    def _compute(self, decoding: list[Sequence]) -> int:
        """Step these sequences; when the step raises, find out whose fault it is by halving. Returns tokens made.

        A failed step has changed nothing, so it may be repeated in parts (which also serves a batch too large for the
        memory), until one sequence fails alone. When one after another does, the error is raised: heal the engine.
        """
        try:
            tokens = self.runner.step([s.slot.index for s in decoding if s.slot])
        except Exception as error:
            self._metrics.engine_failures.inc()
            if len(decoding) > 1:
                half = len(decoding) // 2
                return self._compute(decoding[:half]) + self._compute(decoding[half:])
            self._barren += 1
            if self._barren >= _BARREN:
                raise
            self._fail(decoding[0], error)
            return 0
        self._barren = 0
        return sum(self._take(sequence, tokens[sequence.slot.index]) for sequence in decoding if sequence.slot)

    def _take(self, sequence: Sequence, token: int | None) -> bool:
        """Hand a step's token to its sequence; whether it was one (the end token is none)."""
        if token is None:
            self._spoiled(sequence)
            return False
        sequence.slot.tokens.append(sequence.next)  # type: ignore[union-attr]
        sequence.next = token
        self._time(sequence)
        if token in self.runner.eos:
            self._end(sequence, FinishReason.STOP)
            return False
        sequence.generated += 1
        sequence.emit(token)
        if sequence.generated >= sequence.request.max_new_tokens:
            self._end(sequence, FinishReason.LENGTH)
        return True

    def _time(self, sequence: Sequence) -> None:
        now = self._clock()
        if sequence.generated == 0:
            sequence.first = now
            self._metrics.ttft.observe(now - sequence.submitted)
            self._metrics.prefill.observe(now - sequence.admitted)
        else:
            self._metrics.itl.observe(now - sequence.latest)
        sequence.latest = now

    def _arm(self, sequence: Sequence) -> None:
        if sequence.slot:
            self.runner.arm(sequence.slot.index, sequence.next, len(sequence.prompt) - 1)

    def _compact(self) -> None:
        """Move running slots to the front, so that the step computes no more rows than it must."""
        while hole := self._table.hole():
            last, free = hole
            self.runner.swap(last.index, free.index, max(len(last.tokens), len(free.tokens)) + 1)
            self._table.swap(last, free)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish(Finished(reason), self._clock())
        self._leave(sequence, keep=True)

    def _spoiled(self, sequence: Sequence) -> None:
        """Its numbers are not finite: wipe its KV, or the slot's next owner would read them too."""
        self._metrics.engine_failures.inc()
        if sequence.slot:
            self.runner.clear(sequence.slot.index)
        self._fail(sequence, ArithmeticError("numbers were not finite"))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        _log.error("request %s failed in the model", sequence.request.id, exc_info=error)
        sequence.finish(GenerationFailed("the model could not compute this request", retry_after=1), self._clock())
        self._leave(sequence, keep=False)

    def _leave(self, sequence: Sequence, *, keep: bool) -> None:
        self.running.remove(sequence)
        self._metrics.running.set(len(self.running))
        if sequence.slot:
            self._table.free(sequence.slot, keep=keep)
            self.runner.idle(sequence.slot.index, len(sequence.slot.tokens))
