"""Token ids -> pieces of text: whole characters only, stop strings cut off, reasoning told from the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from model.types import Channel, Chunk

_BROKEN = "\ufffd"
# A character is at most 4 bytes: 8 tokens of context decode every later one right, whatever came before.
_CONTEXT, _WINDOW = 8, 16

Decode = Callable[[Sequence[int]], str]
Unfinished = Callable[[Sequence[int]], int]


class TextAssembler:
    """The text of one generation, token by token.

    decode: ids -> text without special tokens. stop: ends the answer, and is never part of it.
    think: the tags around the reasoning, or None; think_open: the prompt ended inside them.
    unfinished: how many replacement marks at the end of a decoding stand for a character that was cut.
    Joined, the chunks are the same however the tokens cut the text.
    """

    def __init__(
        self, decode: Decode, stop: tuple[str, ...], think: tuple[str, str] | None, think_open: bool,
        unfinished: Unfinished = lambda ids: 0,
    ) -> None:  # fmt: skip
        self.stopped = False
        self.reasoning_tokens = 0
        self._detokenizer = _Detokenizer(decode, unfinished)
        self._stop = stop
        self._open, self._close = think or ("", "")
        self._undecided = think is not None  # whether the text starts with the opening tag
        self._channel: Channel = "reasoning" if think and think_open else "answer"
        self._trim = self._channel == "reasoning"  # newlines right after a tag are not text
        self._held = ""  # text that may still turn out to be part of a tag or a stop string

    def push(self, token_id: int) -> list[Chunk]:
        """The text that this token makes certain: often one chunk, none while something is held back."""
        if self.stopped:
            return []
        before = self._channel
        chunks = self._feed(self._detokenizer.push(token_id))
        self.reasoning_tokens += "reasoning" in (before, self._channel)
        return chunks

    def finish(self) -> list[Chunk]:
        """What was held back, now that nothing follows."""
        return [] if self.stopped else self._feed(self._detokenizer.finish(), last=True)

    def _feed(self, text: str, last: bool = False) -> list[Chunk]:
        self._held += text
        if self._undecided and not self._decide(last):
            return []
        chunks = []
        if self._channel == "reasoning":
            thought, closed = self._until((self._close,), last)
            chunks.append(Chunk(thought, "reasoning"))
            if closed:
                self._channel, self._trim = "answer", True
        if self._channel == "answer":
            answer, self.stopped = self._until(self._stop, last)
            chunks.append(Chunk(answer))
        return [chunk for chunk in chunks if chunk.text]

    def _decide(self, last: bool) -> bool:
        """Only a tag at the very start opens the reasoning; later it is a word like any other."""
        start = self._held.lstrip()
        if start.startswith(self._open):
            self._held, self._channel, self._trim = start[len(self._open) :], "reasoning", True
        elif not last and self._open.startswith(start):
            return False
        self._undecided = False
        return True

    def _until(self, markers: tuple[str, ...], last: bool) -> tuple[str, bool]:
        """The held text before the first of `markers`, and whether there is one; what may become one stays held."""
        if self._trim:  # before stop strings are sought: a blank line after </think> is not the stop "\\n\\n"
            self._held = self._held.lstrip("\n")
            self._trim = not self._held
        # The one that is complete first wins, so that the cut does not depend on the tokens.
        found = [(at + len(marker), at) for marker in markers if (at := self._held.find(marker)) >= 0]
        certain = len(self._held) - (0 if last else _overlap(self._held, markers))
        end, cut = min(found, default=(certain, certain))
        text, self._held = self._held[:cut], self._held[end:]
        return text, bool(found)


class _Detokenizer:
    """Joined, its pieces are the decoding of all ids without a cut last character; no piece ends within a character."""

    def __init__(self, decode: Decode, unfinished: Unfinished) -> None:
        self._decode, self._unfinished = decode, unfinished
        self._window: list[int] = []
        self._done = ""  # the part of the window's text that was given out

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        piece = self._advance(text.rstrip(_BROKEN))
        if len(self._window) >= _WINDOW:
            # Nonsense that lasts that long is no unfinished character; only its last mark still can be.
            piece += self._advance(text.removesuffix(_BROKEN))
            del self._window[:-_CONTEXT]
            self._done = self._decode(self._window).removesuffix(_BROKEN)
        return piece

    def finish(self) -> str:
        text = self._decode(self._window)
        return self._advance(text[: len(text) - self._unfinished(self._window)])

    def _advance(self, certain: str) -> str:
        if not certain.startswith(self._done):
            return ""
        piece, self._done = certain[len(self._done) :], certain
        return piece


def _overlap(text: str, markers: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the start of a marker."""
    longest = max(map(len, markers), default=0)
    counts = range(min(len(text), longest - 1), 0, -1)
    return next((n for n in counts if any(marker.startswith(text[-n:]) for marker in markers)), 0)
