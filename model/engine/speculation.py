"""Prompt-lookup speculation (Saxena, 2023): tokens guessed from what a text said before, read with the next one.

Which token is chosen never depends on it: noise is a function of seed, position and token (sampler.py), so a guess is
right or wrong, and a text is what it would have been. A row that is drawn accepts with the probability that rejection
sampling (Leviathan et al., 2023) gives a guess without a distribution of its own: the model's for that very token.
"""

from __future__ import annotations

from collections.abc import Sequence as List

_GRAM = 3  # tokens that have to agree before what followed them is guessed
_STREAKS = 8  # guesses right in a row that are told apart
_SLOW, _FAST = 0.03, 0.1  # of the moving averages: of how often guesses are right, of what steps take
_OUTLIER = 3.0  # times the usual: such a step was held up by something else
_MARGIN = 1.15  # gain over cost that a guess has to promise


class Lookup:
    """What one sequence would say if it repeated itself or its prompt. streak: guesses that were right in a row."""

    def __init__(self, tokens: List[int]) -> None:
        self.streak = 0
        self._followed: dict[tuple[int, ...], int] = {}  # tokens -> where in the text they were followed, the last time
        self._read = len(tokens)
        self._next: int | None = None  # where in the text the guess is
        for end in range(_GRAM, len(tokens) + 1):
            self._next = self._note(tokens, end)

    def read(self, tokens: List[int]) -> list[tuple[int, bool]]:
        """Take in a text that has grown. For each new token that was guessed: the streak before, and if right."""
        outcomes = []
        for at in range(self._read, len(tokens)):
            if self._next is not None:
                right = tokens[self._next] == tokens[at]
                outcomes.append((min(self.streak, _STREAKS), right))
                self.streak, self._next = (self.streak + 1, self._next + 1) if right else (0, None)
            found = self._note(tokens, at + 1)
            self._next = found if self._next is None else self._next
        self._read = len(tokens)
        return outcomes

    def guess(self, tokens: List[int], most: int) -> List[int]:
        """Up to `most` tokens that may follow."""
        return [] if self._next is None else tokens[self._next : self._next + most]

    def _note(self, tokens: List[int], end: int) -> int | None:
        """Where the last tokens before `end` were followed the time before."""
        gram = tuple(tokens[max(0, end - _GRAM) : end])
        before = self._followed.get(gram)
        self._followed[gram] = end
        return before


class Speculation:
    """How many guesses a step should read: by how often they were right, and what one more costs on this machine."""

    def __init__(self) -> None:
        self._right = [0.3, 0.5, 0.65, 0.75, 0.8, 0.85, 0.88, 0.9, 0.92]  # by streak; first guesses
        # Moving averages of tokens in a step, of its seconds, and of their variance and covariance.
        self._tokens = self._seconds = self._variance = self._covariance = 0.0

    def learn(self, outcomes: List[tuple[int, bool]]) -> None:
        for streak, right in outcomes:
            self._right[streak] += _SLOW * (right - self._right[streak])

    def took(self, tokens: int, seconds: float) -> None:
        """A step read so many tokens in that time."""
        if not self._tokens:
            self._tokens, self._seconds = float(tokens), seconds
        more = tokens - self._tokens
        longer = min(seconds, _OUTLIER * (self._seconds + max(more, 0.0) * self._each())) - self._seconds
        self._tokens += _FAST * more
        self._seconds += _FAST * longer
        self._variance += _FAST * (more * more - self._variance)
        self._covariance += _FAST * (more * longer - self._covariance)

    def length(self, streak: int, rows: int, most: int) -> int:
        """How many guesses pay for a row of a step of `rows`: each costs a token more, and saves a share of a step."""
        each = self._each()
        share = max(self._seconds + each * (rows - self._tokens), each * rows) / rows
        likely = 1.0
        for count in range(most):
            likely *= self._right[min(streak + count, _STREAKS)]
            if likely * share < _MARGIN * each:
                return count
        return most

    def _each(self) -> float:
        """Seconds for a token more in a step. Until steps of several sizes were seen: a third of a token's share."""
        if self._variance < 0.1:
            return self._seconds / max(self._tokens, 1.0) / 3
        return max(self._covariance / self._variance, 0.0)
