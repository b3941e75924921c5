"""One batched sampling step: every row by its own rules, none by its neighbours'."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from model.types import Sampling

CANDIDATES = 256  # top_k and top_p choose among this many most likely tokens; a full sort costs ten times as much
_BLOCK = 32
_LOW = 0xFFFFFFFF


@dataclass(slots=True)
class Rows:
    """What a decode step reads and writes for each slot.

    ids int64 [slots, 1]: the next input; position int64 [slots]: where its KV goes; active bool [slots];
    temperature, top_p, penalty float32 [slots]; top_k, key int64 [slots]; seen bool [slots, vocabulary].
    """

    ids: Tensor
    position: Tensor
    active: Tensor
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    penalty: Tensor
    key: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, slots: int, vocabulary: int, device: str) -> Self:
        def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((slots, *shape), value, dtype=dtype, device=device)

        return cls(
            ids=full(0, torch.int64, 1),
            position=full(0, torch.int64),
            active=full(0, torch.bool),
            temperature=full(0, torch.float32),
            top_p=full(1, torch.float32),
            top_k=full(0, torch.int64),
            penalty=full(1, torch.float32),
            key=full(0, torch.int64),
            seen=full(0, torch.bool, vocabulary),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def first(self, count: int) -> Self:
        """Views of the first `count` slots."""
        return type(self)(*(tensor[:count] for tensor in self.tensors()))

    def swap(self, a: int, b: int) -> None:
        for tensor in self.tensors():
            tensor[[a, b]] = tensor[[b, a]]

    def assign(self, slot: int, sampling: Sampling, seed: int, prompt: Tensor) -> None:
        """Give a slot its request's rules. prompt int64 [n]: tokens that the repetition penalty counts as seen."""
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.top_k[slot] = min(sampling.top_k, CANDIDATES)
        self.penalty[slot] = sampling.repetition_penalty
        self.key[slot] = mix_seed(seed)
        self.seen[slot] = False
        self.seen[slot, prompt] = True


def choose(logits: Tensor, rows: Rows) -> Tensor:
    """The next token of each row: logits float32 [rows, vocabulary] -> int64 [rows].

    Greedy where temperature is 0. Else softmax(logits / temperature) cut to top_k, then to top_p (the smallest set of
    most likely tokens whose probability reaches it), drawn with Gumbel-max: argmax(logit + Gumbel noise).
    """
    logits = penalise(logits, rows)
    greedy = logits.argmax(-1)
    values, tokens = top_candidates(logits / rows.temperature.clamp(min=1e-4)[:, None])
    noise = gumbel(rows.key[:, None], rows.position[:, None], tokens)
    drawn = tokens.gather(1, (values + noise).masked_fill(~kept(values, rows), -torch.inf).argmax(-1, keepdim=True))
    return torch.where(rows.temperature == 0, greedy, drawn[:, 0])


def choose_by_kernel(logits: Tensor, rows: Rows) -> Tensor:
    """As `choose`, by this project's kernel; -1 for a row whose logits are not all finite.

    A row with neither top_k nor top_p is drawn from the whole vocabulary.
    """
    given = (rows.position, rows.temperature, rows.top_p, rows.top_k, rows.penalty, rows.key, rows.seen)
    return torch.ops.slots.choose(logits.contiguous(), *given)


def choose_unfiltered(logits: Tensor, rows: Rows) -> Tensor:
    """As `choose`, for rows with neither top_k nor top_p: drawn from the whole vocabulary. Too slow for every step."""
    tokens = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    scaled = penalise(logits, rows) / rows.temperature.clamp(min=1e-4)[:, None]
    return (scaled + gumbel(rows.key[:, None], rows.position[:, None], tokens)).argmax(-1)


def advance(rows: Rows, tokens: Tensor, finite: Tensor) -> None:
    """Make each active, finite row's new token its next input, seen from now on."""
    moving = rows.active & finite
    rows.ids.copy_(torch.where(moving, tokens, rows.ids[:, 0])[:, None])
    rows.position.add_(moving)
    rows.seen.scatter_(1, rows.ids, rows.seen.gather(1, rows.ids) | moving[:, None])


def penalise(logits: Tensor, rows: Rows) -> Tensor:
    """Repetition penalty of CTRL (Keskar et al. 2019), as transformers applies it: to prompt and answer alike."""
    penalty = rows.penalty[:, None]
    return torch.where(rows.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_candidates(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The CANDIDATES largest logits of each row, descending, and their tokens.

    Exact, in two levels: the k largest numbers lie in at most k blocks, and those blocks have the k largest maxima.
    """
    rows, vocabulary = logits.shape
    if vocabulary <= CANDIDATES * _BLOCK:
        return logits.topk(min(CANDIDATES, vocabulary), -1)
    padded = torch.nn.functional.pad(logits, (0, -vocabulary % _BLOCK), value=-torch.inf)
    blocks = padded.view(rows, -1, _BLOCK)
    best = blocks.amax(-1).topk(CANDIDATES, -1, sorted=False).indices
    pool = blocks.gather(1, best[..., None].expand(-1, -1, _BLOCK)).reshape(rows, -1)
    values, places = pool.topk(CANDIDATES, -1)
    return values, best.gather(1, places // _BLOCK) * _BLOCK + places % _BLOCK


def kept(values: Tensor, rows: Rows) -> Tensor:
    """Which candidates (descending, [rows, k]) top_k and top_p leave in; the first always stays."""
    rank = torch.arange(values.shape[1], device=values.device)
    in_top_k = (rank < rows.top_k[:, None]) | (rows.top_k == 0)[:, None]
    probability = torch.softmax(values.masked_fill(~in_top_k, -torch.inf), -1)
    before = probability.cumsum(-1) - probability
    return in_top_k & ((before < rows.top_p[:, None]) | (rank == 0))


def gumbel(key: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, a pure function of (row's key, position, token): the same in any batch, on any day."""
    hashed = _mix(_mix(key ^ position) ^ tokens)
    uniform = ((hashed >> 9).float() + 0.5) * 2.0**-23  # 24 significant bits: never 0, never 1
    return -torch.log(-torch.log(uniform))


def mix_seed(seed: int) -> int:
    """A seed of up to 64 bits folded to the 32-bit key of a row."""
    return int(_mix(_mix(torch.tensor(seed & _LOW)) ^ torch.tensor(seed >> 32 & _LOW)))


def _mix(x: Tensor) -> Tensor:
    """32-bit integer hash held in int64; shifts and multipliers from the hash-prospector project (bias 0.107).

    Both multipliers are below 2^31, so that no product overflows int64.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _LOW
    x = (x ^ (x >> 15)) * 0x735A2D97 & _LOW
    return x ^ (x >> 15)
