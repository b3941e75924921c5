"""The running batch: which sequences hold a slot, what is computed next, and how each one leaves."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from typing import Protocol, TypeVar

from errors import GenerationFailed, InvalidRequest, ServiceError
from model.engine.sequence import Sequence, SlotTable
from model.types import FinishReason, Sampling
from telemetry import Metrics

_log = logging.getLogger(__name__)
T = TypeVar("T")
Chunk = tuple[int, List[int], int]  # a slot, some of its prompt's tokens, and the position of the first

# Seconds that a chunk of prompts may take, at the speed measured so far: it pauses running streams and delays the next
# prompt. Chunks of 128 tokens cost 3 % of the speed of 512, of 64 tokens 8 % (SmolLM2, one thread).
PAUSE, PAUSE_ALONE = 0.08, 0.15
CHUNK_MIN, CHUNK_MAX = 32, 512  # tokens
_POLL_COMPILED = 1.0  # seconds between two looks for a step that was compiled meanwhile
_MAX_FAILURES = 8  # failures in a row, of one sequence after another: then the engine is broken, not the sequences
_SMOOTHING, _CHUNK_SMOOTHING = 0.1, 0.3  # of the tokens/s estimates, per step and per chunk


class Runner(Protocol):
    """What computes: runner.py, or a test's script. A call that raises has changed nothing and may be repeated."""

    slots: int
    context: int
    eos: frozenset[int]

    def init_row(self, slot: int, sampling: Sampling, seed: int, prompt: List[int]) -> None: ...
    def prefill(self, chunks: List[Chunk]) -> list[bool]: ...
    def activate(self, slot: int, token: int, position: int) -> None: ...
    def deactivate(self, slot: int, position: int) -> None: ...
    def step(self, active: List[int]) -> List[int | None]: ...
    def swap(self, a: int, b: int, tokens: int) -> None: ...
    def clear(self, slot: int) -> None: ...
    def load_compiled(self, idle: bool) -> bool: ...
    def compile_state(self) -> tuple[int, int]: ...
    def details(self) -> Mapping[str, str | int]: ...
    def close(self) -> None: ...


class Scheduler:
    """The sequences that hold a slot. `steps` counts the good ones."""

    def __init__(self, runner: Runner, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.runner, self._metrics, self._clock = runner, metrics, clock
        self.running: list[Sequence] = []
        self.steps = 0
        # Tokens a second over all sequences: first guesses, which the first steps and chunks correct.
        self._speed, self._prefill_speed = 50.0, 800.0
        self._table = SlotTable(runner.slots)
        self._turns: dict[str, int] = {}  # owner -> chunk in which its prompts were last computed, or first seen
        self._chunks = self._compile_failures = self._failures = 0
        self._polled = clock()
        metrics.slots.set(runner.slots)
        metrics.kv_bytes.set(float(runner.details().get("kv_bytes", 0)))

    @property
    def free(self) -> int:
        """How many slots are free."""
        return self.runner.slots - len(self.running)

    def seconds_until_free(self, tokens: int) -> float:
        """Time until `tokens` more are computed and a slot is free, at the speed measured so far."""
        left = [sequence.left for sequence in list(self.running)]
        return bounded_seconds((tokens + min(left, default=0) * max(1, len(left))) / self._speed)

    def admit(self, sequence: Sequence) -> None:
        """Give a sequence a free slot and the KV it can reuse; end it where it does not fit, or cannot begin."""
        request = sequence.request
        if len(sequence.prompt) + request.max_new_tokens > self.runner.context:
            refusal = too_long(self.runner.context, len(sequence.prompt), request.max_new_tokens)
            return sequence.finish(refusal, self._clock())
        sequence.slot = slot = self._table.allocate(request.owner, sequence.prompt)
        sequence.admitted = self._clock()
        sequence.cached = len(slot.tokens)
        self.running.append(sequence)
        self._metrics.queue_wait.observe(sequence.admitted - sequence.submitted)
        self._metrics.cached_tokens.inc(sequence.cached)
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        try:
            self.runner.init_row(slot.index, request.sampling, seed, sequence.prompt)
            self.runner.deactivate(slot.index, sequence.cached)
            self._activate_if_computed(sequence)
        except Exception as error:
            self._fail(sequence, error)

    def reap(self) -> None:
        """Let go of those that were closed or ran out of time."""
        now = self._clock()
        for sequence in list(self.running):
            if ending := sequence.ending(now):
                self._leave(sequence, ending)

    def prefill(self) -> None:
        """Compute one chunk: the next tokens of the prompts that are not complete."""
        chunk = self._next_chunk()
        if not chunk:
            return
        before, done = self._clock(), 0
        for sequence, finite in self._compute(chunk, self._run_chunk):
            if finite:
                sequence.slot.tokens += sequence.chunk
                done += len(sequence.chunk)
                self._activate_if_computed(sequence)
            else:
                self._spoiled(sequence)
        if done >= CHUNK_MIN:  # a few tokens take as long as many
            speed = done / max(self._clock() - before, 1e-6)
            self._prefill_speed += _CHUNK_SMOOTHING * (speed - self._prefill_speed)
        self._metrics.prompt_tokens.inc(done)

    def _next_chunk(self) -> list[Sequence]:
        """Share a chunk between users in turns; of one user's prompts, the one with the shortest rest goes first."""
        prompts = sorted((s for s in self.running if s.rest), key=lambda s: s.rest)
        self._turns = {s.request.owner: self._turns.get(s.request.owner, self._chunks) for s in prompts}
        self._chunks += 1
        room = self._room(prompts)
        share = max(room // max(1, len(self._turns)), CHUNK_MIN)
        chunk: list[Sequence] = []
        for owner in sorted(self._turns, key=lambda owner: self._turns[owner]):
            left = min(share, room)
            for sequence in (s for s in prompts if s.request.owner == owner):
                sequence.chunk = sequence.prompt[-1 - sequence.rest : -1][:left]
                if sequence.chunk:
                    chunk.append(sequence)
                    self._turns[owner] = self._chunks
                    left, room = left - len(sequence.chunk), room - len(sequence.chunk)
        return chunk

    def _room(self, prompts: List[Sequence]) -> int:
        """Tokens of the next chunk: beside each other, every user's part is at most what the shortest rest needs."""
        pause = PAUSE if len(prompts) < len(self.running) else PAUSE_ALONE
        room = int(min(max(self._prefill_speed * pause, CHUNK_MIN), CHUNK_MAX))
        users = len(self._turns)
        return min(room, users * max(prompts[0].rest, CHUNK_MIN)) if users > 1 else room

    def _run_chunk(self, chunk: List[Sequence]) -> list[bool]:
        return self.runner.prefill([(s.slot.index, s.chunk, len(s.slot.tokens)) for s in chunk])

    def load_compiled(self, idle: bool) -> bool:
        """Take over a compiled step that has become available; whether there was one."""
        self._polled = self._clock()
        loaded = self.runner.load_compiled(idle)
        steps, failures = self.runner.compile_state()
        self._metrics.compiled.set(steps)
        self._metrics.compile_fallbacks.inc(failures - self._compile_failures)
        self._compile_failures = failures
        return loaded

    def step(self) -> None:
        """One token for each sequence whose prompt is computed."""
        decoding = [s for s in self.running if not s.rest]
        if not decoding:
            return
        for last, free in self._table.compact():
            self.runner.swap(last.index, free.index, max(len(last.tokens), len(free.tokens)) + 1)
        before = self._clock()
        if before - self._polled >= _POLL_COMPILED:
            self.load_compiled(idle=False)
        results = self._compute(decoding, self._run_step)
        now = self._clock()
        done = sum(self._take(sequence, token, now) for sequence, token in results)
        if done:
            self.steps += 1
            self._speed += _SMOOTHING * (done / max(now - before, 1e-6) - self._speed)
            self._metrics.tokens_per_second.set(self._speed)
            self._metrics.generated_tokens.inc(done)

    def fail_all(self, error: ServiceError) -> None:
        """Tell every reader that nothing follows; from any thread, and without the runner, which may be what failed."""
        for sequence in list(self.running):
            sequence.finish(error, self._clock())

    def _compute(self, sequences: list[Sequence], run: Callable[[List[Sequence]], List[T]]) -> list[tuple[Sequence, T]]:
        """Run these sequences together; where that raises, in halves, down to the one that fails alone: the others.

        A run that raised has changed nothing and may be repeated, which also serves a batch too large for the memory.
        Raises when one sequence after another fails: then the engine is broken.
        """
        try:
            results = run(sequences)
        except Exception as error:
            self._metrics.engine_failures.inc()
            if half := len(sequences) // 2:
                return self._compute(sequences[:half], run) + self._compute(sequences[half:], run)
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                raise
            self._fail(sequences[0], error)
            return []
        self._failures = 0
        return list(zip(sequences, results, strict=True))

    def _run_step(self, decoding: List[Sequence]) -> list[int | None]:
        slots = [s.slot.index for s in decoding]
        tokens = self.runner.step(slots)
        return [tokens[slot] for slot in slots]

    def _take(self, sequence: Sequence, token: int | None, now: float) -> int:
        """Hand a step's token to its sequence; how many tokens that were (the end token is none)."""
        if token is None:
            self._spoiled(sequence)
            return 0
        sequence.slot.tokens.append(sequence.next)
        sequence.next = token
        if sequence.generated:
            self._metrics.itl.observe(now - sequence.latest)
        else:
            sequence.first = now
            self._metrics.ttft.observe(now - sequence.submitted)
            self._metrics.prefill.observe(now - sequence.admitted)
        sequence.latest = now
        if token in self.runner.eos:
            self._leave(sequence, FinishReason.STOP)
            return 0
        sequence.generated += 1
        sequence.items.put(token)
        if sequence.generated >= sequence.request.max_new_tokens:
            self._leave(sequence, FinishReason.LENGTH)
        return 1

    def _activate_if_computed(self, sequence: Sequence) -> None:
        if not sequence.rest:
            self.runner.activate(sequence.slot.index, sequence.next, len(sequence.prompt) - 1)

    def _spoiled(self, sequence: Sequence) -> None:
        """Its numbers are not finite: wipe its KV, or the slot's next owner would read them too."""
        self._metrics.engine_failures.inc()
        self.runner.clear(sequence.slot.index)
        self._fail(sequence, ArithmeticError("numbers were not finite"))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        _log.error("request %s failed in the model", sequence.request.id, exc_info=error)
        self._leave(sequence, GenerationFailed("the model could not compute this request", retry_after=1), keep=False)

    def _leave(self, sequence: Sequence, ending: FinishReason | ServiceError, keep: bool = True) -> None:
        sequence.finish(ending, self._clock())
        self.running.remove(sequence)
        self._table.free(sequence.slot, keep=keep)
        self.runner.deactivate(sequence.slot.index, len(sequence.slot.tokens))


def bounded_seconds(seconds: float) -> float:
    """What a client is told to wait: between one second and ten minutes."""
    return round(min(600.0, max(1.0, seconds)), 1)


def too_long(context: int, prompt: int, wanted: int) -> InvalidRequest:
    """The refusal of a prompt that does not fit, or not with `wanted` new tokens; OpenAI's clients know its words."""
    fits = prompt < context
    more = f" and max_new_tokens is {wanted}, but may be {context - prompt} at most" if fits else ""
    return InvalidRequest(
        f"This model's maximum context length is {context} tokens; the prompt has {prompt} tokens{more}.",
        param="max_new_tokens" if fits else "prompt",
        code="context_length_exceeded",
    )
