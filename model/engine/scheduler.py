"""The running batch: who is in it, what is computed next, and how each one leaves.

Belongs to the model thread. Imports no torch and knows neither the queue before it nor the text after it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from collections.abc import Sequence as List
from typing import TypeVar

from errors import GenerationFailed, InvalidRequest, ServiceError
from model.engine.protocol import Runner
from model.engine.sequence import Finished, Sequence
from model.engine.slots import Slot, SlotTable
from model.types import FinishReason
from telemetry import Metrics

_log = logging.getLogger(__name__)
T = TypeVar("T")

# Prompt tokens computed between two steps. While others stream a chunk is a pause for them, of so many seconds by the
# speed seen so far; alone, larger is faster.
PAUSE = 0.08
CHUNK_LEAST, CHUNK_ALONE = 32, 512
_LOOK_EVERY = 1.0  # seconds between two looks for a step that was compiled meanwhile
_BARREN = 8  # steps that fail in a row for one sequence after another: then it is the engine that is broken
_SMOOTHING = 0.1  # of the tokens/s estimates, per step or chunk


class Batch:
    """The sequences that hold a slot. `speed` is tokens a second over all of them; `steps` counts the good ones."""

    def __init__(self, runner: Runner, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.runner, self._metrics, self._clock = runner, metrics, clock
        self.running: list[Sequence] = []
        self.speed = 50.0  # a first guess; the first steps correct it
        self.steps = 0
        self._prefill_speed = 800.0  # tokens a second, likewise
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
        """Compute one chunk: the next tokens of the oldest prompts that are not complete, of several if they fit."""
        waiting = [s for s in self.running if not s.prefilled]
        room = CHUNK_ALONE
        if len(waiting) < len(self.running):
            room = int(min(max(self._prefill_speed * PAUSE, CHUNK_LEAST), CHUNK_ALONE))
        chunk: list[Sequence] = []
        for sequence in waiting:
            if room > 0:
                end = min(sequence.computed + room, len(sequence.prompt) - 1)
                sequence.chunk = sequence.prompt[sequence.computed : end]
                room -= len(sequence.chunk)
                chunk.append(sequence)
        if chunk:
            before = self._clock()
            done = self._compute(chunk, self._run_chunk, self._keep)
            speed = done / max(self._clock() - before, 1e-6)
            self._prefill_speed += _SMOOTHING * (speed - self._prefill_speed)
            self._metrics.prompt_tokens.inc(done)

    def _run_chunk(self, chunk: List[Sequence]) -> List[bool]:
        return self.runner.prefill([(s.slot.index, s.chunk, s.computed) for s in chunk if s.slot])

    def _keep(self, sequence: Sequence, finite: bool) -> int:
        """Take note of a prompt's chunk; how many tokens it had."""
        if not finite or not sequence.slot:
            self._spoiled(sequence)
            return 0
        sequence.slot.tokens += sequence.chunk
        sequence.computed += len(sequence.chunk)
        if sequence.prefilled:
            self._arm(sequence)
        return len(sequence.chunk)

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
        done = self._compute(decoding, self._run_step, self._take)
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

    def _compute(
        self, sequences: list[Sequence], run: Callable[[List[Sequence]], List[T]], take: Callable[[Sequence, T], int]
    ) -> int:
        """Run these sequences together; when that raises, find out whose fault it is by halving. Returns tokens made.

        What failed has changed nothing, so it may be repeated in parts (which also serves a batch too large for the
        memory), until one sequence fails alone. When one after another does, the error is raised: heal the engine.
        """
        try:
            results = run(sequences)
        except Exception as error:
            self._metrics.engine_failures.inc()
            if len(sequences) > 1:
                half = len(sequences) // 2
                return self._compute(sequences[:half], run, take) + self._compute(sequences[half:], run, take)
            self._barren += 1
            if self._barren >= _BARREN:
                raise
            self._fail(sequences[0], error)
            return 0
        self._barren = 0
        return sum(take(sequence, result) for sequence, result in zip(sequences, results, strict=True))

    def _run_step(self, decoding: List[Sequence]) -> List[int | None]:
        slots = [s.slot.index for s in decoding if s.slot]
        tokens = self.runner.step(slots)
        return [tokens[slot] for slot in slots]

    def _take(self, sequence: Sequence, token: int | None) -> int:
        """Hand a step's token to its sequence; how many tokens that were (the end token is none)."""
        if token is None or not sequence.slot:
            self._spoiled(sequence)
            return 0
        sequence.slot.tokens.append(sequence.next)
        sequence.next = token
        self._time(sequence)
        if token in self.runner.eos:
            self._end(sequence, FinishReason.STOP)
            return 0
        sequence.generated += 1
        sequence.emit(token)
        if sequence.generated >= sequence.request.max_new_tokens:
            self._end(sequence, FinishReason.LENGTH)
        return 1

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
