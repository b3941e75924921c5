"""The next token of each row of a batch, by its own rules and none of its neighbours'."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from model.types import Sampling

CANDIDATES = 256  # top_k and top_p choose among this many most likely tokens; a full sort costs ten times as much
UNSOUND = -1  # instead of a token, where the logits are not finite
_BLOCK = 32
_LOW = 0xFFFFFFFF


@dataclass(slots=True)
class Rules:
    """How each row of the engine chooses; greedily, until a request sets it.

    temperature, top_p, penalty float32 [rows]; top_k, key int64 [rows]; seen bool [rows, vocabulary].
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    penalty: Tensor
    key: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, rows: int, vocabulary: int, device: str) -> Self:
        def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        return cls(
            temperature=full(0, torch.float32),
            top_p=full(1, torch.float32),
            top_k=full(0, torch.int64),
            penalty=full(1, torch.float32),
            key=full(0, torch.int64),
            seen=full(0, torch.bool, vocabulary),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def of(self, row: Tensor) -> Self:
        """Those of each token: row int64 [n]."""
        return type(self)(*(tensor[row] for tensor in self.tensors()))

    def assign(self, row: int, sampling: Sampling, seed: int, tokens: Tensor) -> None:
        """Give a row its request's rules. tokens int64 [n]: those that the repetition penalty counts as seen."""
        self.temperature[row] = sampling.temperature
        self.top_p[row] = sampling.top_p
        self.top_k[row] = min(sampling.top_k, CANDIDATES)
        self.penalty[row] = sampling.repetition_penalty
        self.key[row] = mix_seed(seed)
        self.seen[row] = False
        self.seen[row, tokens] = True


def choose(logits: Tensor, position: Tensor, row: Tensor, rules: Rules) -> Tensor:
    """The token after each one: logits float32 [n, vocabulary], position, row int64 [n] -> int64 [n].

    -1 where not all logits are finite. Greedy where temperature is 0. Else softmax(logits / temperature) cut to top_k,
    then to top_p (the smallest set of most likely tokens whose probability reaches it), drawn with Gumbel-max:
    argmax(logit + Gumbel noise); with neither cut, from the whole vocabulary. Each chosen token counts as seen.
    """
    mine = rules.of(row)
    penalised = penalise(logits, mine)
    scaled = penalised / mine.temperature.clamp(min=1e-4)[:, None]
    values, candidates = top_candidates(scaled)
    noise = gumbel(mine.key[:, None], position[:, None], candidates)
    cut = candidates.gather(1, (values + noise).masked_fill(~kept(values, mine), -torch.inf).argmax(-1, keepdim=True))
    everything = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    free = (scaled + gumbel(mine.key[:, None], position[:, None], everything)).argmax(-1)
    drawn = torch.where((mine.top_k == 0) & (mine.top_p >= 1), free, cut[:, 0])
    chosen = torch.where(mine.temperature == 0, penalised.argmax(-1), drawn)
    chosen = torch.where(logits.isfinite().all(-1), chosen, UNSOUND)
    marked = row, chosen.clamp(min=0)
    rules.seen.index_put_(marked, (chosen >= 0) | rules.seen[marked])
    return chosen


def choose_by_kernel(logits: Tensor, position: Tensor, row: Tensor, rules: Rules) -> Tensor:
    """As `choose`, by this project's kernel."""
    return torch.ops.slots.choose(logits.contiguous(), position, row, *rules.tensors())


def penalise(logits: Tensor, rules: Rules) -> Tensor:
    """Repetition penalty of CTRL (Keskar et al. 2019), as transformers applies it: to prompt and answer alike."""
    penalty = rules.penalty[:, None]
    return torch.where(rules.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


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


def kept(values: Tensor, rules: Rules) -> Tensor:
    """Which candidates (descending, [rows, k]) top_k and top_p leave in; the first always stays."""
    rank = torch.arange(values.shape[1], device=values.device)
    in_top_k = (rank < rules.top_k[:, None]) | (rules.top_k == 0)[:, None]
    probability = torch.softmax(values.masked_fill(~in_top_k, -torch.inf), -1)
    before = probability.cumsum(-1) - probability
    return in_top_k & ((before < rules.top_p[:, None]) | (rank == 0))


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
