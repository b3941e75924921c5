"""The running batch: which sequences hold a row and blocks, what is computed next, and how each one leaves."""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from typing import NamedTuple, Protocol, TypeVar

from errors import GenerationFailed, InvalidRequest, ServiceError
from model.engine.blocks import BlockPool, Copy
from model.engine.sequence import RequestQueue, Sequence
from model.engine.speculation import Lookup, Speculation
from model.types import FinishReason, Sampling
from telemetry import Metrics

_log = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds that a chunk of prompts may take, at the speed measured so far: it pauses running streams and delays the next
# prompt. Chunks of 128 tokens cost 3 % of the speed of 512, of 64 tokens 8 % (SmolLM2, one thread).
PAUSE, PAUSE_ALONE = 0.08, 0.5
CHUNK_MIN = 32  # tokens
_POLL_COMPILED = 1.0  # seconds between two looks for a step that was compiled meanwhile
_MAX_FAILURES = 8  # failures in a row, of one sequence after another: then the engine is broken, not the sequences
_SMOOTHING, _CHUNK_SMOOTHING = 0.1, 0.3  # of the tokens/s estimates, per step and per chunk


class Work(NamedTuple):
    """Tokens of one sequence for the model to read, the first at `position`; their KV goes into `blocks`.

    row: where `begin` put the sequence's rules. blocks: the sequence's, in order, at least as many as it fills.
    """

    row: int
    tokens: List[int]
    position: int
    blocks: List[int]


class Runner(Protocol):
    """What computes: runner.py, or a test's script. A call that raises has changed nothing and may be repeated."""

    slots: int  # rows: sequences that may run at once
    blocks: int  # of KV that all share, numbered from 1
    context: int  # tokens that a sequence may have; they fit into the blocks
    guesses: int  # most tokens that a row may guess, 0: none
    step_tokens: int  # a step reads at most
    chunk_tokens: int  # a chunk of prompts has at most
    eos: frozenset[int]

    def begin(self, row: int, sampling: Sampling, seed: int, tokens: List[int]) -> None: ...
    def prefill(self, work: List[Work]) -> list[bool]: ...
    def step(self, work: List[Work]) -> list[List[int | None]]: ...
    def copy(self, copy: Copy) -> None: ...
    def clear(self, blocks: List[int]) -> None: ...
    def load_compiled(self, idle: bool) -> bool: ...
    def compile_state(self) -> tuple[int, int]: ...
    def details(self) -> Mapping[str, str | int]: ...
    def close(self) -> None: ...


class Scheduler:
    """The sequences that were admitted. `steps` counts the good ones."""

    def __init__(self, runner: Runner, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.runner, self._metrics, self._clock = runner, metrics, clock
        self.running: list[Sequence] = []  # those that hold a row and blocks, the oldest first
        self.preempted: list[Sequence] = []  # those that had to give both back, the oldest first
        self.steps = 0
        # Tokens a second over all sequences: first guesses, which the first steps and chunks correct.
        self._speed, self._prefill_speed = 50.0, 800.0
        self._pool = BlockPool(runner.blocks)
        self._rows = list(range(runner.slots))
        self._speculation = Speculation()
        self._turns: dict[str, int] = {}  # owner -> chunk in which its prompts were last computed, or first seen
        self._chunks = self._compile_failures = self._failures = self._orders = 0
        self._polled = clock()
        metrics.slots.set(runner.slots)
        metrics.kv_bytes.set(float(runner.details().get("kv_bytes", 0)))
        metrics.kv_blocks_free.set_function(lambda: self._pool.free)
        metrics.kv_blocks_used.set_function(lambda: self._pool.count - self._pool.free)

    @property
    def free(self) -> int:
        """How many more sequences could run, as far as rows go."""
        return max(0, self.runner.slots - len(self.running) - len(self.preempted))

    def details(self) -> Mapping[str, str | int]:
        """What /readyz tells, from any thread."""
        blocks = {"kv_blocks": self._pool.count, "kv_blocks_free": self._pool.free}
        return {**self.runner.details(), **blocks, "running": len(self.running), "preempted": len(self.preempted)}

    def seconds_until_free(self, tokens: int) -> float:
        """Time until `tokens` more are computed and a row is free, at the speed measured so far."""
        left = [sequence.left for sequence in list(self.running)]
        return bounded_seconds((tokens + min(left, default=0) * max(1, len(left))) / self._speed)

    def admit(self, queue: RequestQueue) -> None:
        """Let begin whose turn it is, those that were preempted first, until one does not find its row or blocks."""
        while self._rows and self.preempted and self._begin(self.preempted[0]):
            del self.preempted[0]
        while self._rows and not self.preempted and queue and self._begin(queue.first()):
            queue.take()

    def _begin(self, sequence: Sequence) -> bool:
        """Give a sequence a row, blocks for all its tokens, and the KV it can reuse; False while too few are free.

        One that can never fit, or cannot begin, is ended. A block for each that runs stays free: all grow.
        """
        request, fresh = sequence.request, not sequence.order
        if sequence.prompt_tokens + request.max_new_tokens > self.runner.context:
            refusal = too_long(self.runner.context, sequence.prompt_tokens, request.max_new_tokens)
            sequence.finish(refusal, self._clock())
            return True
        begun = self._pool.begin(request.owner, sequence.tokens, spare=len(self.running))
        if not begun:
            return False
        (sequence.table, copy), sequence.row = begun, self._rows.pop(0)
        if fresh:
            self._orders += 1
            sequence.order, sequence.admitted, sequence.cached = self._orders, self._clock(), sequence.table.computed
            self._metrics.queue_wait.observe(sequence.admitted - sequence.submitted)
            self._metrics.cached_tokens.inc(sequence.cached)
        insort(self.running, sequence, key=lambda each: each.order)
        try:
            if copy:
                self.runner.copy(copy)
            self.runner.begin(sequence.row, request.sampling, sequence.seed, sequence.tokens)
        except Exception as error:
            self._fail(sequence, error)
        return True

    def reap(self) -> None:
        """Let go of those that were closed or ran out of time."""
        now = self._clock()
        for sequence in self.running + self.preempted:
            if ending := sequence.ending(now):
                self._leave(sequence, ending)

    def prefill(self) -> None:
        """Compute one chunk: the next tokens of the prompts that are not complete."""
        chunk = self._next_chunk()
        if not chunk:
            return
        before, done = self._clock(), 0
        for sequence, finite in self._compute(chunk, self.runner.prefill):
            if finite:
                self._pool.write(sequence.table, sequence.chunk)
                done += len(sequence.chunk)
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
                start = sequence.table.computed
                sequence.chunk = sequence.tokens[start : start + min(left, sequence.rest)]
                if sequence.chunk:
                    chunk.append(sequence)
                    self._turns[owner] = self._chunks
                    left, room = left - len(sequence.chunk), room - len(sequence.chunk)
        return chunk

    def _room(self, prompts: List[Sequence]) -> int:
        """Tokens of the next chunk: beside each other, every user's part is at most what the shortest rest needs."""
        pause = PAUSE if len(prompts) < len(self.running) else PAUSE_ALONE
        room = int(min(max(self._prefill_speed * pause, CHUNK_MIN), self.runner.chunk_tokens))
        users = len(self._turns)
        return min(room, users * max(prompts[0].rest, CHUNK_MIN)) if users > 1 else room

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
        """A token for each sequence whose prompt is computed, and more where guesses were right."""
        decoding = self._with_room()
        if not decoding:
            return
        for sequence in decoding:
            sequence.chunk = [sequence.tokens[-1], *self._guesses(sequence, len(decoding))]
        if self._clock() - self._polled >= _POLL_COMPILED:
            self.load_compiled(idle=False)
        before = self._clock()
        results = self._compute(decoding, self.runner.step)
        now = self._clock()
        self._speculation.took(sum(len(sequence.chunk) for sequence in decoding), now - before)
        done = sum(self._take(sequence, tokens, now) for sequence, tokens in results)
        if done:
            self.steps += 1
            self._speed += _SMOOTHING * (done / max(now - before, 1e-6) - self._speed)
            self._metrics.tokens_per_second.set(self._speed)
            self._metrics.generated_tokens.inc(done)

    def _with_room(self) -> list[Sequence]:
        """Those that are decoded next. Where one finds no block for its next token, the youngest gives its own back."""
        for sequence in [s for s in self.running if not s.rest]:
            while sequence in self.running and not self._pool.grow(sequence.table, 1):
                youngest = self.running[-1]
                self._let_go(youngest)
                insort(self.preempted, youngest, key=lambda each: each.order)
                self._metrics.preemptions.inc()
        return [s for s in self.running if not s.rest]

    def _guesses(self, sequence: Sequence, rows: int) -> List[int]:
        """Tokens to read beside the next one. A repetition penalty would count them before they are right: none."""
        if not self.runner.guesses or sequence.request.sampling.repetition_penalty != 1:
            return []
        lookup = sequence.lookup = sequence.lookup or Lookup(sequence.tokens)
        self._speculation.learn(lookup.read(sequence.tokens))
        wanted = sequence.request.max_new_tokens - sequence.generated - 1
        most = min(self.runner.guesses, self.runner.step_tokens // rows - 1, sequence.table.room - 1, wanted)
        return lookup.guess(sequence.tokens, self._speculation.length(lookup.streak, rows, most)) if most > 0 else []

    def fail_all(self, error: ServiceError) -> None:
        """Tell every reader that nothing follows; from any thread, and without the runner, which may be what failed."""
        for sequence in self.running + self.preempted:
            sequence.finish(error, self._clock())

    def _compute(self, sequences: list[Sequence], run: Callable[[List[Work]], List[T]]) -> list[tuple[Sequence, T]]:
        """Run these chunks together; where that raises, in halves, down to the one that fails alone: the others.

        A run that raised has changed nothing and may be repeated, which also serves a batch too large for the memory.
        Raises when one sequence after another fails: then the engine is broken.
        """
        try:
            results = run([_work(sequence) for sequence in sequences])
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

    def _take(self, sequence: Sequence, chosen: List[int | None], now: float) -> int:
        """Hand a step's tokens to its sequence, one after each that was read, up to a guess that was wrong.

        How many tokens that were (the end token is none).
        """
        before = sequence.generated
        for at, token in enumerate(chosen):
            if token is None:
                self._spoiled(sequence)
                break
            self._pool.write(sequence.table, [sequence.tokens[-1]])
            sequence.tokens.append(token)
            if self._ended(sequence, token, now) or sequence.chunk[at + 1 : at + 2] != [token]:
                break
        return sequence.generated - before

    def _ended(self, sequence: Sequence, token: int, now: float) -> bool:
        """Tell the reader a new token; whether it was the last."""
        if sequence.generated:
            self._metrics.itl.observe(now - sequence.latest)
        else:
            sequence.first = now
            self._metrics.ttft.observe(now - sequence.submitted)
            self._metrics.prefill.observe(now - sequence.admitted)
        sequence.latest = now
        if token in self.runner.eos:
            self._leave(sequence, FinishReason.STOP)
            return True
        sequence.generated += 1
        sequence.items.put(token)
        if sequence.generated >= sequence.request.max_new_tokens:
            self._leave(sequence, FinishReason.LENGTH)
            return True
        return False

    def _spoiled(self, sequence: Sequence) -> None:
        """Its numbers are not finite, and its KV is no better."""
        self._metrics.engine_failures.inc()
        self._fail(sequence, ArithmeticError("numbers were not finite"))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        _log.error("request %s failed in the model", sequence.request.id, exc_info=error)
        self._leave(sequence, GenerationFailed("the model could not compute this request", retry_after=1), keep=False)

    def _leave(self, sequence: Sequence, ending: FinishReason | ServiceError, keep: bool = True) -> None:
        sequence.finish(ending, self._clock())
        if sequence in self.preempted:
            self.preempted.remove(sequence)
        else:
            self._let_go(sequence, keep)

    def _let_go(self, sequence: Sequence, keep: bool = True) -> None:
        """Free a sequence's row and blocks; keep: its KV is sound. Else it is wiped: a masked NaN is still NaN."""
        self.running.remove(sequence)
        self._rows.append(sequence.row)
        forgotten = self._pool.release(sequence.table, keep=keep)
        if not keep:
            self.runner.clear(forgotten)


def _work(sequence: Sequence) -> Work:
    return Work(sequence.row, sequence.chunk, sequence.table.computed, sequence.table.indices)


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
