"""Key files with several keys: the newest writes, all read."""

from __future__ import annotations

from pathlib import Path

import pytest

from crypto import KeyFileError, KeyRing, SealBroken, rotate

A, B = "ab" * 32, "cd" * 32


def ring(*lines: str) -> KeyRing:
    return KeyRing.parse("\n".join(lines).encode(), Path("keys"))


def test_a_ring_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys"
    sealed = KeyRing.load_or_create(path).box("cache").seal(b"secret", b"")
    assert KeyRing.load_or_create(path).box("cache").open(sealed, b"") == b"secret"
    assert path.stat().st_mode & 0o777 == 0o600 and len(path.read_bytes()) == 65


def test_after_a_change_of_keys_the_old_one_reads_and_the_new_one_writes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    old = KeyRing.load_or_create(path)
    sealed = old.box("cache").seal(b"kept", b"")
    rotate(path)
    both = KeyRing.load_or_create(path)
    assert both.box("cache").open(sealed, b"") == b"kept"
    with pytest.raises(SealBroken):
        old.box("cache").open(both.box("cache").seal(b"new", b""), b"")
    assert path.stat().st_mode & 0o777 == 0o600 and sorted(file.name for file in tmp_path.iterdir()) == ["keys"]
    path.write_bytes(path.read_bytes().splitlines()[0])
    with pytest.raises(SealBroken):
        KeyRing.load_or_create(path).box("cache").open(sealed, b"")


def test_purposes_do_not_open_each_other() -> None:
    sealed = ring(A).box("cache").seal(b"x", b"")
    with pytest.raises(SealBroken):
        ring(A).box("contents").open(sealed, b"")


def test_codes_are_named_and_the_newest_signs() -> None:
    old, new = ring(A).mac_keys("audit"), ring(B, A).mac_keys("audit")
    assert new.newest != old.newest
    assert new.sign(old.newest, b"x") == old.sign(old.newest, b"x") != new.sign(new.newest, b"x")
    with pytest.raises(KeyError):
        old.sign(new.newest, b"x")


def test_remarks_and_empty_lines_are_skipped() -> None:
    assert ring("# newest", B, "", f"  {A}  ").mac_keys("a").newest == ring(B).mac_keys("a").newest


@pytest.mark.parametrize("text", ["", "\n#only a remark", "ab", A + "0", f"{A}\nnonsense", "é" * 32])
def test_what_is_no_key_file_is_one_line_without_what_is_in_it(text: str) -> None:
    with pytest.raises(KeyFileError, match=r"^keys: needs 64 hex digits a line [^\n]+$") as refused:
        ring(text)
    assert A not in str(refused.value)


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_a_ring_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    KeyRing.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match="too open"):
        KeyRing.load_or_create(path)
    with pytest.raises(KeyFileError, match="too open"):
        rotate(path)
    assert len(path.read_bytes().splitlines()) == 1
