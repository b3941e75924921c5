"""KV memory in blocks that all sequences share: who holds which, and whose content is found again. Knows no torch.

A block is full, then never written again and held by as many sequences as begin with the same tokens; or it is the last
of one sequence, which alone writes it. Content is found by all that stands before it and its owner: a chain of digests
that begins with the owner's, so that nobody meets another's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from hashlib import blake2b

BLOCK = 256  # tokens


@dataclass(slots=True, eq=False)
class Block:
    """index: where its KV lies. chain: digest of the owner and of all tokens before. tokens: whose KV is written."""

    index: int
    holders: int = 0
    chain: bytes = b""
    tokens: list[int] = field(default_factory=list)

    def shared(self, tokens: List[int]) -> int:
        """How many of `tokens` it begins with."""
        pairs = enumerate(zip(self.tokens, tokens, strict=False))
        return next((at for at, (mine, other) in pairs if mine != other), min(len(self.tokens), len(tokens)))


@dataclass(slots=True, eq=False)
class Table:
    """The blocks of one sequence, in the order of its tokens. computed: tokens whose KV is written."""

    chain: bytes  # of the owner and all full blocks
    blocks: list[Block] = field(default_factory=list)
    computed: int = 0

    @property
    def indices(self) -> list[int]:
        return [block.index for block in self.blocks]

    @property
    def room(self) -> int:
        """Tokens that still find a place."""
        return len(self.blocks) * BLOCK - self.computed


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `tokens` positions of a block that are wanted in another."""

    source: int
    target: int
    tokens: int


class BlockPool:
    """`count` blocks, numbered from 1: number 0 is nobody's, for rows that only fill a batch up."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._fresh = [Block(index) for index in range(count, 0, -1)]
        self._idle: dict[Block, None] = {}  # held by nobody and still found, the least recently used first
        self._after: dict[bytes, list[Block]] = {}  # chain -> the blocks that begin there

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._fresh) + len(self._idle)

    def begin(self, owner: str, tokens: List[int], spare: int = 0) -> tuple[Table, Copy | None] | None:
        """A table with room for `tokens` that shares what KV of them is here; None unless `spare` blocks stay free.

        At least the last token is left to compute. The copy is to be made before anything is computed.
        """
        table = Table(_digest(b"", owner.encode()))
        source, shared = self._longest(table, tokens)
        while source and shared == BLOCK:
            table.blocks.append(source)
            table.computed += BLOCK
            table.chain = _digest(table.chain, array("I", source.tokens))
            source, shared = self._longest(table, tokens)
        # One that nobody writes, and of which all is wanted, changes hands; of another one a copy is begun.
        if adopted := source if source in self._idle and shared == len(source.tokens) else None:
            table.blocks.append(adopted)
        missing = blocks_for(len(tokens)) - len(table.blocks)
        if self.free - sum(block in self._idle for block in table.blocks) < missing + spare:
            return None
        for block in table.blocks:
            self._idle.pop(block, None)
            block.holders += 1
        table.blocks += [self._take() for _ in range(missing)]
        copy = None
        if adopted:
            table.computed += shared
        elif source and shared:
            copy = Copy(source.index, table.blocks[table.computed // BLOCK].index, shared)
            self.write(table, tokens[table.computed : table.computed + shared])
        return table, copy

    def grow(self, table: Table, tokens: int) -> bool:
        """Make room for `tokens` more; False, and nothing changed, when too few blocks are free."""
        missing = blocks_for(table.computed + tokens) - len(table.blocks)
        if missing > self.free:
            return False
        table.blocks += [self._take() for _ in range(missing)]
        return True

    def write(self, table: Table, tokens: List[int]) -> None:
        """Note that the KV of a table's next tokens is there, from now on to be found. There has to be room."""
        at = 0
        while at < len(tokens):
            block = table.blocks[table.computed // BLOCK]
            if not block.tokens:
                block.chain = table.chain
                self._after.setdefault(block.chain, []).append(block)
            part = tokens[at : at + BLOCK - len(block.tokens)]
            block.tokens += part
            at, table.computed = at + len(part), table.computed + len(part)
            if len(block.tokens) == BLOCK:
                table.chain = _digest(table.chain, array("I", block.tokens))

    def release(self, table: Table, *, keep: bool = True) -> list[int]:
        """Give all blocks back; keep: their KV is sound, and found again. The indices of those that are forgotten."""
        forgotten = []
        for block in reversed(table.blocks):  # so that the end of a text goes before its beginning
            block.holders -= 1
            if block.holders:
                continue
            if keep and block.tokens:
                self._idle[block] = None
            else:
                self._forget(block)
                self._fresh.append(block)
                forgotten.append(block.index)
        table.blocks.clear()
        table.computed = 0
        return forgotten

    def _longest(self, table: Table, tokens: List[int]) -> tuple[Block | None, int]:
        """Of the blocks that may follow in a table, the one that shares most of the next `tokens`, and how many."""
        wanted = tokens[table.computed : min(table.computed + BLOCK, len(tokens) - 1)]
        found = [(block.shared(wanted), block) for block in self._after.get(table.chain, ())] if wanted else []
        shared, block = max(found, key=lambda pair: pair[0], default=(0, None))
        return (block, shared) if shared else (None, 0)

    def _take(self) -> Block:
        """A block of which nothing is known any more. Raises StopIteration when all are held."""
        if not self._fresh:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            self._forget(oldest)
            self._fresh.append(oldest)
        block = self._fresh.pop()
        block.holders = 1
        return block

    def _forget(self, block: Block) -> None:
        if block.tokens:
            self._after[block.chain].remove(block)
            if not self._after[block.chain]:
                del self._after[block.chain]
            block.tokens.clear()


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


def _digest(chain: bytes, content: bytes | array[int]) -> bytes:
    return blake2b(chain + bytes(content), digest_size=16).digest()
