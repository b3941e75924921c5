"""Key files and key rings, encryption and HMACs."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import sha256
from hmac import digest
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto import Encryptor, KeyRing, SealBroken, derive, load_or_create_key, mac, rotate
from settings import SettingsError

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


def test_a_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "key"
    key = load_or_create_key(path)
    assert len(key) == 32 and key != bytes(32)
    assert load_or_create_key(path) == key == path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["key"], "no draft is left behind"


def test_processes_that_start_together_get_the_same_key(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from crypto import load_or_create_key as load; "
    code += "sys.stdin.read(); print(load(Path(sys.argv[1])).hex())"
    command = [sys.executable, "-c", code, str(tmp_path / "key")]
    ready, go = os.pipe()
    running = [subprocess.Popen(command, stdin=ready, stdout=subprocess.PIPE) for _ in range(4)]
    os.close(ready)
    os.close(go)  # the end of file for which all four wait
    keys = {process.communicate(timeout=30)[0] for process in running}
    assert keys == {(tmp_path / "key").read_bytes().hex().encode() + b"\n"}


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_key_of_the_wrong_size_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"^[^\n]*key: must hold exactly 32 random bytes[^\n]*$"):
        load_or_create_key(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o620, 0o602, 0o666])
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    load_or_create_key(path)
    path.chmod(mode)
    with pytest.raises(SettingsError, match=rf"^[^\n]*mode {mode:o} is too open[^\n]*$"):
        load_or_create_key(path)


def test_a_key_file_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"^[^\n]+key: File exists; no key[^\n]+$"):
        load_or_create_key(tmp_path / "file" / "key")
    with pytest.raises(SettingsError, match=r"^[^\n]+Is a directory[^\n]+$"):
        load_or_create_key(tmp_path)


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_an_encryptor_gives_back_what_it_sealed(plain: bytes, context: bytes) -> None:
    encryptor = Encryptor(KEY)
    sealed = encryptor.seal(plain, context)
    assert encryptor.open(sealed, context) == plain
    assert sealed != encryptor.seal(plain, context), "a nonce was used twice"


def test_every_byte_of_a_sealed_text_is_guarded() -> None:
    encryptor = Encryptor(KEY)
    sealed = encryptor.seal(b"secret", b"here")
    for i in range(len(sealed)):
        with pytest.raises(SealBroken):
            encryptor.open(sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :], b"here")
        with pytest.raises(SealBroken):
            encryptor.open(sealed[:i], b"here")


def test_an_encryptor_opens_only_for_its_context_and_key() -> None:
    sealed = Encryptor(KEY).seal(b"secret", b"here")
    with pytest.raises(SealBroken):
        Encryptor(KEY).open(sealed, b"there")
    with pytest.raises(SealBroken):
        Encryptor(OTHER).open(sealed, b"here")


def test_an_old_key_still_opens_and_the_newest_seals() -> None:
    changed = Encryptor(OTHER, KEY)
    assert changed.open(Encryptor(KEY).seal(b"old", b""), b"") == b"old"
    assert Encryptor(OTHER).open(changed.seal(b"new", b""), b"") == b"new"
    with pytest.raises(SealBroken):
        Encryptor(KEY).open(changed.seal(b"new", b""), b"")


def test_no_two_lists_of_parts_share_a_code() -> None:
    lists = [(), (b"",), (b"", b""), (b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), (b"", b"abc")]
    assert all(mac(KEY, *a) != mac(KEY, *b) for a, b in combinations(lists, 2))
    assert mac(KEY, b"ab", b"c") == mac(KEY, b"ab", b"c") != mac(OTHER, b"ab", b"c")


def test_derived_keys_are_apart_and_repeatable() -> None:
    assert derive(KEY, "tokens") == derive(KEY, "tokens")
    assert len({KEY, derive(KEY, "tokens"), derive(KEY, "cache"), derive(OTHER, "tokens")}) == 4
    # The RFC's formula, written out for one block.
    extracted = digest(bytes(32), KEY, sha256)
    assert derive(KEY, "tokens") == digest(extracted, b"tokens\x01", sha256)


A, B = "ab" * 32, "cd" * 32


def ring(*lines: str) -> KeyRing:
    return KeyRing.parse("\n".join(lines).encode(), Path("keys"))


def test_a_ring_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys"
    sealed = KeyRing.load_or_create(path).encryptor("cache").seal(b"secret", b"")
    assert KeyRing.load_or_create(path).encryptor("cache").open(sealed, b"") == b"secret"
    assert path.stat().st_mode & 0o777 == 0o600 and len(path.read_bytes()) == 65


def test_after_a_change_of_keys_the_old_one_reads_and_the_new_one_writes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    old = KeyRing.load_or_create(path)
    sealed = old.encryptor("cache").seal(b"kept", b"")
    rotate(path)
    both = KeyRing.load_or_create(path)
    assert both.encryptor("cache").open(sealed, b"") == b"kept"
    with pytest.raises(SealBroken):
        old.encryptor("cache").open(both.encryptor("cache").seal(b"new", b""), b"")
    assert path.stat().st_mode & 0o777 == 0o600 and sorted(file.name for file in tmp_path.iterdir()) == ["keys"]
    path.write_bytes(path.read_bytes().splitlines()[0])
    with pytest.raises(SealBroken):
        KeyRing.load_or_create(path).encryptor("cache").open(sealed, b"")


def test_purposes_do_not_open_each_other() -> None:
    sealed = ring(A).encryptor("cache").seal(b"x", b"")
    with pytest.raises(SealBroken):
        ring(A).encryptor("contents").open(sealed, b"")


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
    with pytest.raises(SettingsError, match=r"^keys: needs 64 hex digits a line [^\n]+$") as refused:
        ring(text)
    assert A not in str(refused.value)


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_a_ring_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    KeyRing.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(SettingsError, match="too open"):
        KeyRing.load_or_create(path)
    with pytest.raises(SettingsError, match="too open"):
        rotate(path)
    assert len(path.read_bytes().splitlines()) == 1
