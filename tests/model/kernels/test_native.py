"""The CPU kernels: built once, refused where they cannot be, and attention as it is defined."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model.engine.blocks import BLOCK
from model.kernels import native

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """As in a new process; what would be loaded is noted, for a process can register an operator only once."""
    loaded: list[Path] = []
    monkeypatch.setattr(native, "_loaded", False)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    return loaded


def attention(q: Tensor, keys: Tensor, values: Tensor, blocks: list[int], last: int, scale: float) -> Tensor:
    """q float32 [heads, d] over the columns of one sequence up to `last`, by the definition, in float64."""
    kv_heads, d = keys.shape[1], keys.shape[3]
    k, v = (t[blocks].transpose(0, 1).reshape(kv_heads, -1, d)[:, : last + 1].double() for t in (keys, values))
    grouped = q.double().view(kv_heads, -1, d)
    return (torch.softmax(grouped @ k.transpose(1, 2) * scale, -1) @ v).view(-1, d).float()


def facts(places: list[tuple[int, int]]) -> Tensor:
    """A batch's tokens from (sequence, position) of each; attention reads neither ids nor rows."""
    sequence, position = (torch.tensor(column) for column in zip(*places, strict=True))
    return torch.stack([torch.full_like(position, -1), position, torch.full_like(position, -1), sequence])


def tables_of(*sequences: list[int]) -> Tensor:
    """A batch's tables, filled up with block 0."""
    width = max(map(len, sequences))
    return torch.tensor([blocks + [0] * (width - len(blocks)) for blocks in sequences], dtype=torch.int32)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, places: list[tuple[int, int]], scale: float
) -> Tensor:
    """What q [tokens, heads, d] sees from its places, its own KV being what is there already; [tokens, heads, d]."""
    tokens, angles = facts(places), torch.ones(2, len(q), q.shape[2])
    angles[1] = 0  # cosine 1 and sine 0: nothing turns
    block, column = tables[tokens[3], tokens[1] // BLOCK], tokens[1] % BLOCK
    own = [t[block, :, column].float().flatten(1) for t in (keys, values)]
    qkv = torch.cat([q.flatten(1), *own], -1)
    return torch.ops.slots.attend(qkv, *angles, keys, values, tables, tokens, scale).view_as(q)


def shuffled(count: int, kv_heads: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[int]]:
    """Keys and values of `count` blocks and block 0, which is NaN, and the blocks' numbers in random order."""
    keys, values = (torch.randn(count + 1, kv_heads, BLOCK, d).to(dtype) for _ in range(2))
    keys[0], values[0] = torch.nan, torch.nan  # nobody's, and so it reaches nobody
    return keys, values, (torch.randperm(count) + 1).tolist()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_turned_and_written_before_any_row_attends(dtype: torch.dtype) -> None:
    """Against transformers' own rotation; a sequence's second token sees its first, another sequence's sees neither."""
    torch.manual_seed(0)
    heads, kv_heads, d = 6, 2, 32
    keys, values = (torch.randn(6, kv_heads, BLOCK, d).to(dtype) for _ in range(2))
    before = keys.clone(), values.clone()
    sequences, places = [[3], [5, 1], [4, 2]], [(1, BLOCK - 1), (1, BLOCK), (2, 9)]
    qkv, (cos, sin) = torch.randn(3, (heads + 2 * kv_heads) * d), torch.randn(2, 3, d)
    tables, tokens = tables_of(*sequences), facts(places)
    got = torch.ops.slots.attend(qkv, cos, sin, keys, values, tables, tokens, 0.2).view(3, heads, d)
    q, k, v = (part.view(3, -1, 1, d) for part in qkv.split([heads * d, kv_heads * d, kv_heads * d], -1))
    q, k = apply_rotary_pos_emb(q, k, cos[:, None], sin[:, None])
    for tensor, old, new in zip((keys, values), before, (k, v), strict=True):
        for row, (block, column) in enumerate([(5, BLOCK - 1), (1, 0), (4, 9)]):
            old[block, :, column] = new[row, :, 0].to(dtype)
        torch.testing.assert_close(tensor, old)  # and nothing else was touched
    for row, (sequence, last) in enumerate(places):
        torch.testing.assert_close(got[row], attention(q[row, :, 0], keys, values, sequences[sequence], last, 0.2))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (4, 2, 16), (28, 4, 128), (5, 1, 64), (6, 6, 32)])
def test_attention_is_what_it_is_defined_to_be(heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keys, values, free = shuffled(9, kv_heads, d, dtype)
    sequences = [free[:1], free[1:2], free[2:5], free[5:8]]
    places = [(0, 0), (1, 5), (2, 255), (3, 256), (3, 700), (0, 63), (1, 64), (2, 767)]
    q = 3 * torch.randn(len(places), heads, d)
    got = attend(q, keys, values, tables_of(*sequences), places, d**-0.5)
    for row, (sequence, last) in enumerate(places):
        torch.testing.assert_close(got[row], attention(q[row], keys, values, sequences[sequence], last, d**-0.5))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (7, 1), (4, 4)])
def test_prompts_side_by_side_are_attended_as_token_by_token(heads: int, kv_heads: int) -> None:
    """Runs of one sequence share their columns: of two prompts, the one longer than a run and over a block's border."""
    torch.manual_seed(0)
    keys, values, free = shuffled(3, kv_heads, 32, torch.float32)
    sequences, places = [free[:2], free[2:]], [(0, at) for at in range(236, 306)] + [(1, at) for at in range(5)]
    for tensor in (keys, values):  # what lies behind a prompt is nobody's
        tensor[free[1], :, 50:], tensor[free[2], :, 5:] = torch.nan, torch.nan
    q = torch.randn(75, heads, 32)
    got = attend(q, keys, values, tables_of(*sequences), places, 0.2)
    want = [attention(q[row], keys, values, sequences[index], last, 0.2) for row, (index, last) in enumerate(places)]
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("d", [16, 64, 128])
def test_a_token_has_the_same_bits_alone_and_among_its_sequences_others(d: int, group: int, dtype: torch.dtype) -> None:
    """Two to 70 of them in a call, as guesses and prompts are, over borders of tiles, runs and blocks."""
    torch.manual_seed(d + group)
    keys, values, free = shuffled(2, 2, d, dtype)
    tables, places = tables_of(free), [(0, at) for at in range(205, 275)]
    q = 3 * torch.randn(70, 2 * group, d)
    alone = torch.cat([attend(q[at : at + 1], keys, values, tables, places[at : at + 1], 0.2) for at in range(70)])
    for count in range(2, 71):
        first = (7 * count) % (71 - count)
        part = slice(first, first + count)
        assert torch.equal(attend(q[part], keys, values, tables, places[part], 0.2), alone[part]), count


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_beside_other_sequences(dtype: torch.dtype) -> None:
    """Single tokens, guesses and a prompt in one call, in any order, by one thread and by three."""
    torch.manual_seed(0)
    keys, values, free = shuffled(8, 3, 64, dtype)
    sequences = [free[:1], free[1:3], free[3:4], free[4:8]]
    parts = [[(0, 60)], [(1, 300 + at) for at in range(8)], [(2, at) for at in range(40)], [(3, 1000)]]
    queries = [torch.randn(len(part), 9, 64) for part in parts]
    want = [attend(q, keys, values, tables_of(*sequences), part, 0.125) for q, part in zip(queries, parts, strict=True)]
    for order, threads in (([0, 1, 2, 3], 1), ([3, 1, 0, 2], 1), ([2, 3, 1, 0], 3)):
        torch.ops.slots.set_threads(threads)
        try:
            places = [place for index in order for place in parts[index]]
            together = torch.cat([queries[index] for index in order])
            got = attend(together, keys, values, tables_of(*sequences), places, 0.125)
        finally:
            torch.ops.slots.set_threads(1)
        assert torch.equal(got, torch.cat([want[index] for index in order]))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_blocks_changes_no_bit(dtype: torch.dtype) -> None:
    """Nor does the place of the sequence among the tables, nor another that holds the same first blocks."""
    torch.manual_seed(0)
    keys, values, free = shuffled(7, 2, 32, dtype)
    places = [(0, at) for at in range(3 * BLOCK - 20, 3 * BLOCK + 15)]
    q, ordered = torch.randn(35, 8, 32), list(range(1, 5))
    want = attend(q, keys, values, tables_of(ordered), places, 0.2)
    moved = [torch.full_like(t, torch.nan) for t in (keys, values)]
    for old, new in zip(ordered, free, strict=False):
        for tensor, source in zip(moved, (keys, values), strict=True):
            tensor[new] = source[old]
    assert torch.equal(attend(q, *moved, tables_of(free[:4]), places, 0.2), want)
    beside = tables_of(free[:4], [*free[:3], free[6]])
    for tensor in moved:
        tensor[free[6]] = 0
    both = attend(torch.cat([q, q]), *moved, beside.flip(0), [(1, at) for _, at in places] + places, 0.2)
    assert torch.equal(both[:35], want)
    assert torch.equal(both[35:55], want[:20]) and not torch.equal(both[55:], want[20:])  # the last block differs


@pytest.mark.usefixtures("kernels")
def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    keys = torch.zeros(2, 1, BLOCK, 16)
    keys[1, 0, 7], keys[1, 0, 200] = 100.0, -100.0
    values = torch.arange(float(BLOCK))[:, None].expand(2, 1, BLOCK, 16).contiguous()
    got = attend(torch.full((1, 1, 16), 100.0), keys, values, tables_of([1]), [(0, BLOCK - 1)], 1.0)
    assert torch.equal(got, torch.full((1, 1, 16), 7.0))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("side", [0, 1])
def test_a_number_that_is_not_finite_reaches_those_who_read_it_and_nobody_else(side: int) -> None:
    """Neither those before it in its sequence, which a guess that was wrong comes after, nor other sequences."""
    kv = [torch.randn(3, 1, BLOCK, 16) for _ in range(2)]
    kv[side][2, 0, 10] = torch.nan
    for places in ([(0, 9)], [(0, 10)], [(1, 10)], [(0, 8), (0, 9), (0, 10), (0, 11), (1, 10), (1, 11)]):
        got = attend(torch.randn(len(places), 2, 16), *kv, tables_of([2], [1]), places, 0.25)
        wanted = [sequence == 1 or last < 10 for sequence, last in places]
        assert got.isfinite().flatten(1).all(-1).tolist() == wanted


@pytest.mark.usefixtures("kernels")
def test_a_guess_that_was_wrong_is_written_over() -> None:
    """What three guesses left behind the next token changes no bit of what comes after."""
    torch.manual_seed(0)
    clean, d, tables = [torch.randn(3, 2, BLOCK, 32) for _ in range(2)], 32, tables_of([2, 1])
    guessed = [tensor.clone() for tensor in clean]
    qkv, angles = torch.randn(4, (4 + 2 * 2) * d), torch.randn(2, 4, d)
    places = [(0, BLOCK - 2 + at) for at in range(4)]
    wrong = torch.cat([qkv[:1], torch.randn(3, qkv.shape[1])])
    first = torch.ops.slots.attend(wrong, *angles, *guessed, tables, facts(places), 0.2)
    want = torch.cat([
        torch.ops.slots.attend(qkv[at, None], *angles[:, at, None], *clean, tables, facts(places[at : at + 1]), 0.2)
        for at in range(4)
    ])  # fmt: skip
    assert torch.equal(first[0], want[0]) and not torch.equal(guessed[0], clean[0])
    again = torch.ops.slots.attend(qkv[1:], *angles[:, 1:].contiguous(), *guessed, tables, facts(places[1:]), 0.2)
    assert torch.equal(again, want[1:]) and all(map(torch.equal, guessed, clean))


def test_what_was_built_is_found_again(
    unloaded: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tmp_path /= "with a space"
    assert native.load(tmp_path)
    assert [record.getMessage().split(" kernels")[0] for record in caplog.records] == [
        "building the CPU",
        "built the CPU",
    ]
    assert unloaded == list(tmp_path.iterdir())  # one file, and nothing that was made on the way
    assert b"slots" in unloaded[0].read_bytes()
    monkeypatch.setattr(native, "_loaded", False)
    monkeypatch.setattr(native, "_build", lambda library: pytest.fail("built twice"))
    assert native.load(tmp_path) and unloaded == 2 * list(tmp_path.iterdir())


@pytest.mark.usefixtures("unloaded")
def test_without_a_compiler_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert not native.load(tmp_path)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1 and "/no/such/compiler" in said[0] and "apt install g++" in said[0]


@pytest.mark.usefixtures("unloaded")
def test_a_compiler_that_fails_is_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no space left for this' >&2\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    assert not native.load(tmp_path / "compiled")
    assert "no space left for this" in caplog.text
    assert list((tmp_path / "compiled").iterdir()) == []  # nothing half made is left


@pytest.mark.usefixtures("unloaded")
def test_another_processor_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not native.load(tmp_path / "compiled")
    assert not (tmp_path / "compiled").exists()


def test_a_processor_of_another_kind_gets_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = native._fingerprint()
    monkeypatch.setattr(native, "_lines", lambda file: ["flags : sse2"])
    assert native._fingerprint() != mine
