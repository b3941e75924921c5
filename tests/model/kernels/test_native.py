"""The CPU kernels: built once, refused where they cannot be, and attention as it is defined."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model.kernels import native

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """As in a new process; what would be loaded is noted, for a process can register an operator only once."""
    loaded: list[Path] = []
    monkeypatch.setattr(native, "_loaded", False)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    return loaded


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot: int, last: int, scale: float
) -> torch.Tensor:
    """q float32 [heads, d] over the columns of one slot, by the definition, in float64."""
    _, _, kv_heads, _, d = keys.shape
    k, v = (t[:, slot].transpose(0, 1).reshape(kv_heads, -1, d)[:, : last + 1].double() for t in (keys, values))
    grouped = q.double().view(kv_heads, -1, d)
    return (torch.softmax(grouped @ k.transpose(1, 2) * scale, -1) @ v).view(-1, d).float()


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor, last: torch.Tensor, scale: float
) -> torch.Tensor:
    """What q [rows, heads, d] sees of columns 0 to `last`, whose own KV is what is there already; [rows, heads, d]."""
    size, angles = keys.shape[3], torch.ones(2, len(q), q.shape[2])
    angles[1] = 0  # cosine 1 and sine 0: nothing turns
    own = [t[last // size, slot, :, last % size].float().flatten(1) for t in (keys, values)]
    qkv = torch.cat([q.flatten(1), *own], -1)
    return torch.ops.slots.attend(qkv, *angles, keys, values, slot, last, last, scale).view_as(q)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_turned_and_written_before_any_row_attends(dtype: torch.dtype) -> None:
    """Against transformers' own rotation; the second row sees what the first one wrote, an idle one sees column 0."""
    torch.manual_seed(0)
    heads, kv_heads, d = 6, 2, 32
    keys, values = (torch.randn(2, 3, kv_heads, 256, d).to(dtype) for _ in range(2))
    before = keys.clone(), values.clone()
    slot, position, last = torch.tensor([2, 2, 0]), torch.tensor([255, 256, 9]), torch.tensor([255, 256, 0])
    qkv, (cos, sin) = torch.randn(3, (heads + 2 * kv_heads) * d), torch.randn(2, 3, d)
    got = torch.ops.slots.attend(qkv, cos, sin, keys, values, slot, position, last, 0.2).view(3, heads, d)
    q, k, v = (part.view(3, -1, 1, d) for part in qkv.split([heads * d, kv_heads * d, kv_heads * d], -1))
    q, k = apply_rotary_pos_emb(q, k, cos[:, None], sin[:, None])
    for tensor, old, new in zip((keys, values), before, (k, v), strict=True):
        old[position // 256, slot, :, position % 256] = new[:, :, 0].to(dtype)
        torch.testing.assert_close(tensor, old)  # and nothing else was touched
    for row in range(3):
        want = attention(q[row, :, 0], keys, values, int(slot[row]), int(last[row]), 0.2)
        torch.testing.assert_close(got[row], want)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (4, 2, 16), (28, 4, 128), (5, 1, 64), (6, 6, 32)])
def test_attention_is_what_it_is_defined_to_be(heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keys, values = (torch.randn(3, 4, kv_heads, 256, d).to(dtype) for _ in range(2))
    places = [(0, 0), (1, 5), (2, 255), (3, 256), (3, 700), (0, 63), (1, 64), (2, 767)]
    slot, last = (torch.tensor(column) for column in zip(*places, strict=True))
    q = 3 * torch.randn(len(places), heads, d)
    got = attend(q, keys, values, slot, last, d**-0.5)
    for row, (index, length) in enumerate(places):
        torch.testing.assert_close(got[row], attention(q[row], keys, values, index, length, d**-0.5))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (7, 1), (4, 4)])
def test_prompts_side_by_side_are_attended_as_token_by_token(heads: int, kv_heads: int) -> None:
    """Runs of one slot share their columns: of two prompts, the one longer than a run and over a page's border."""
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 3, kv_heads, 256, 32) for _ in range(2))
    keys[1, 0, :, 50:], values[1, 0, :, 50:] = torch.nan, torch.nan  # what lies behind a prompt is nobody's
    slot, last = torch.tensor([0] * 70 + [2] * 5), torch.cat([torch.arange(236, 306), torch.arange(5)])
    q = torch.randn(75, heads, 32)
    got = attend(q, keys, values, slot, last, 0.2)
    want = [attention(q[row], keys, values, int(slot[row]), int(last[row]), 0.2) for row in range(75)]
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.usefixtures("kernels")
def test_a_row_of_attention_is_bitwise_the_same_alone() -> None:
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 8, 3, 256, 64).bfloat16() for _ in range(2))
    q, slot, last = torch.randn(8, 9, 64), torch.arange(8), torch.arange(8) * 60
    together = attend(q, keys, values, slot, last, 0.125)
    for row in range(8):
        one = slice(row, row + 1)
        assert torch.equal(attend(q[one], keys, values, slot[one], last[one], 0.125)[0], together[row])


@pytest.mark.usefixtures("kernels")
def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    keys = torch.zeros(1, 1, 1, 256, 16)
    keys[0, 0, 0, 7], keys[0, 0, 0, 200] = 100.0, -100.0
    values = torch.arange(256.0)[:, None].expand(1, 1, 1, 256, 16).contiguous()
    q, first, last = torch.full((1, 1, 16), 100.0), torch.tensor([0]), torch.tensor([255])
    assert torch.equal(attend(q, keys, values, first, last, 1.0), torch.full((1, 1, 16), 7.0))


@pytest.mark.usefixtures("kernels")
def test_a_number_that_is_not_finite_reaches_those_who_read_it_and_nobody_else() -> None:
    keys, values = (torch.randn(1, 2, 1, 256, 16) for _ in range(2))
    for tensor in (keys, values):
        tensor[0, 0, 0, 10] = torch.nan
        places = torch.tensor([0, 0, 1]), torch.tensor([9, 10, 10])
        got = attend(torch.randn(3, 2, 16), keys, values, *places, 0.25)
        assert got.isfinite().flatten(1).all(-1).tolist() == [True, False, True]


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
