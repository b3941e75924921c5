"""The first minutes: `make` on a machine that is not ready, interrupted, or run twice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ops.stack import ROOT
from tests.stack.client import until

PYTHON = f"{sys.base_prefix}/bin/python3"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with this Makefile and a service that needs no packages; there is a space in its name."""
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)  # where `make test` runs this: its inner make would tell of itself
    folder = tmp_path / "my checkout"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "requirements.txt").write_text("# nothing\n")
    return folder


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=checkout, capture_output=True, text=True, timeout=60)


def interpreter(checkout: Path, script: str) -> str:
    """An own `python` that runs this shell script and then, if that did not end it, the real one."""
    path = checkout.parent / "python"
    path.write_text(f'#!/bin/sh\n{script}\nexec {PYTHON} "$@"\n')
    path.chmod(0o755)
    return f"PYTHON={path}"


def set_up(checkout: Path) -> None:
    """A `.venv` as if the packages were installed, whose gunicorn only tells what it was given."""
    programs = checkout / ".venv/bin"
    programs.mkdir(parents=True)
    for name, script in (("python", "exit 0"), ("gunicorn", 'echo "port $PORT for $1"')):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    (programs / "dotenv").symlink_to(Path(sys.executable).parent / "dotenv")
    (checkout / ".venv/installed").touch()


def test_an_old_python_is_one_line_that_names_the_way_out(checkout: Path) -> None:
    done = make(checkout, "run", interpreter(checkout, "exit 1"))
    assert done.returncode and "Python 3.11 or newer is needed" in done.stderr and "PYTHON=python3.12" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_without_venv_says_what_to_install(checkout: Path) -> None:
    done = make(checkout, "run", interpreter(checkout, 'case "$2" in *ensurepip*) exit 1;; esac'))
    assert done.returncode and "apt install python3-venv" in done.stderr


def test_packages_that_cannot_be_had_are_one_line_and_no_half_set_up(checkout: Path) -> None:
    (checkout / "requirements.txt").write_text("./no-such-folder\n")
    done = make(checkout, "run", f"PYTHON={PYTHON}")
    assert done.returncode and "run make again" in done.stderr
    assert not (checkout / ".venv/installed").exists()


def test_ctrl_c_in_the_middle_and_make_again_just_works_and_quietly(checkout: Path) -> None:
    python = interpreter(checkout, 'case "$2" in venv) mkdir -p .venv/bin; touch .venv/bin/half; read forever;; esac')
    process = subprocess.Popen(["make", "run", python], cwd=checkout, start_new_session=True, stdin=subprocess.PIPE)
    until((checkout / ".venv/bin/half").exists)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) != 0
    process.stdin.close()  # type: ignore[union-attr]

    again = make(checkout, ".venv/installed", f"PYTHON={PYTHON}")
    assert again.returncode == 0, again.stderr
    assert (
        again.stdout.splitlines()[0] == "Installing the packages of requirements.txt into .venv, which takes minutes."
    )
    assert "-m pip" not in again.stdout + again.stderr and "exit 1" not in again.stdout + again.stderr
    assert (checkout / ".venv/installed").exists()
    assert not (checkout / ".venv/bin/half").exists() and not (checkout / ".venv/.unfinished").exists()
    assert (
        subprocess.run([checkout / ".venv/bin/python", "-m", "pip", "--version"], capture_output=True).returncode == 0
    )


def test_make_alone_prints_help_and_installs_nothing(checkout: Path) -> None:
    done = make(checkout)
    targets = set(re.findall(r"^make ([a-z-]+)", done.stdout, re.MULTILINE))
    phony = next(line for line in (checkout / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    assert done.returncode == 0 and not (checkout / ".venv").exists()
    assert targets | {"help", "services", "promises"} == set(phony.split()[1:])


def test_without_a_gpu_the_cpu_build_is_named_and_taken_where_it_is_given(checkout: Path, tmp_path: Path) -> None:
    planned = make(checkout, "-n", ".venv/installed").stdout
    assert "docs/operations.md, Disk" in planned and "command -v nvidia-smi" in planned
    given = make(checkout, "-n", ".venv/installed", "TORCH=/my wheels/torch.whl").stdout
    assert '"/my wheels/torch.whl" -r requirements.txt' in given and "nvidia-smi" not in given


def test_make_model_can_verify_all_of_it(checkout: Path) -> None:
    set_up(checkout)
    assert make(checkout, "-n", "model", "VERIFY=1").stdout.endswith("python -m model --verify\n")


def test_the_second_run_installs_nothing_until_the_requirements_change(checkout: Path) -> None:
    set_up(checkout)
    assert make(checkout, "-q", ".venv/installed").returncode == 0
    os.utime(checkout / "requirements.txt", (time.time() + 5, time.time() + 5))
    assert make(checkout, "-q", ".venv/installed").returncode == 1


def test_settings_come_from_env_file_and_the_environment_wins(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(checkout)
    (checkout / ".env").write_text("PORT=6001\n")
    monkeypatch.delenv("PORT", raising=False)
    assert make(checkout, "run").stdout == "port 6001 for app:create_app()\n"
    monkeypatch.setenv("PORT", "6002")
    assert make(checkout, "run").stdout == "port 6002 for app:create_app()\n"


@pytest.mark.parametrize("target", ["run", "stack"])
def test_the_model_is_prepared_before_anything_serves_it(checkout: Path, target: str) -> None:
    set_up(checkout)
    planned = make(checkout, "-n", target).stdout.splitlines()
    assert "python -m model" in planned[0] and len(planned) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="installing packages needs root")
def test_what_is_installed_for_the_tests_is_neither_started_nor_enabled(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "id", "rm", "chmod"):
        (programs / name).symlink_to(shutil.which(name) or name)
    for name in ("apt-get", "systemctl"):
        (programs / name).write_text(
            f'#!/bin/sh\necho {name} "$@" $(/usr/sbin/policy-rc.d >/dev/null; echo $?) >>{tmp_path}/log\n'
        )
        (programs / name).chmod(0o755)
    policy, before = Path("/usr/sbin/policy-rc.d"), Path("/usr/sbin/policy-rc.d").exists()
    subprocess.run([ROOT / "ops/install-services"], env={"PATH": str(programs)}, check=True)
    log = (tmp_path / "log").read_text().splitlines()
    (installed,) = [line.split() for line in log if line.startswith("apt-get install")]
    assert installed[-1] == "101" and {"redis-server", "prometheus", "chromium"} <= set(installed)  # 101: do not start
    assert {
        "systemctl disable --now --quiet prometheus 101",
        "systemctl disable --now --quiet redis-server 101",
    } <= set(log)
    assert policy.exists() is before


def secrets(
    folder: Path, domain: str = "llm.example.org", cert: Path | str = "", key: Path | str = ""
) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "TLS_CERT": str(cert), "TLS_KEY": str(key)}
    return subprocess.run([ROOT / "ops/make-secrets", folder, domain], capture_output=True, text=True, env=given)


def test_secrets_are_random_private_and_never_overwritten(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert secrets(first).returncode == secrets(second).returncode == 0
    before = {file.name: file.read_bytes() for file in first.iterdir()}
    assert all((second / name).read_bytes() != content for name, content in before.items())
    assert first.stat().st_mode & 0o777 == 0o700

    again = secrets(first)
    assert again.returncode and "stays as it is" in again.stderr
    assert before == {file.name: file.read_bytes() for file in first.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


@pytest.mark.parametrize("name", ["llm.example.org", "192.168.1.20"])
def test_the_certificate_is_for_the_name_asked_for(tmp_path: Path, name: str) -> None:
    secrets(tmp_path / "secrets", name)
    kind = "-checkip" if name[0].isdigit() else "-checkhost"
    command = ["openssl", "x509", "-noout", "-in", tmp_path / "secrets/tls.crt", kind, name]
    assert "does match" in subprocess.run(command, capture_output=True, text=True).stdout


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """A certificate as certbot keeps it: links to files that only their owner reads."""
    assert secrets(tmp_path / "archive", "own.example.org").returncode == 0
    folder = tmp_path / "live"
    folder.mkdir()
    for name, file in (("fullchain.pem", "tls.crt"), ("privkey.pem", "tls.key")):
        (tmp_path / "archive" / file).chmod(0o600)
        (folder / name).symlink_to(tmp_path / "archive" / file)
    return folder


def test_a_certificate_of_ones_own_is_copied_for_nginx_to_read(tmp_path: Path, live: Path) -> None:
    done = secrets(tmp_path / "secrets", cert=live / "fullchain.pem", key=live / "privkey.pem")
    assert done.returncode == 0, done.stderr
    for name, source in (("tls.crt", "fullchain.pem"), ("tls.key", "privkey.pem")):
        copy = tmp_path / "secrets" / name
        assert not copy.is_symlink() and copy.stat().st_mode & 0o777 == 0o444
        assert copy.read_bytes() == (live / source).read_bytes()
    assert len(list((tmp_path / "secrets").iterdir())) == 7 and (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700


def test_a_renewed_certificate_replaces_only_itself_where_nginx_has_it_mounted(tmp_path: Path, live: Path) -> None:
    made = tmp_path / "secrets"
    secrets(made)
    before = {file.name: (file.read_bytes(), file.stat().st_ino) for file in made.iterdir()}
    assert secrets(made, cert=live / "fullchain.pem", key=live / "privkey.pem").returncode == 0
    after = {file.name: (file.read_bytes(), file.stat().st_ino) for file in made.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"tls.crt", "tls.key"}
    assert {name: inode for name, (_, inode) in before.items()} == {name: inode for name, (_, inode) in after.items()}
    assert {file.stat().st_mode & 0o777 for file in made.iterdir()} == {0o444}


def test_a_certificate_that_cannot_be_used_is_one_line_and_nothing_is_replaced(tmp_path: Path, live: Path) -> None:
    made, cert, key = tmp_path / "secrets", live / "fullchain.pem", live / "privkey.pem"
    secrets(made)
    before = [file.read_bytes() for file in sorted(made.iterdir())]
    for given, said in [
        ((cert, ""), "TLS_KEY cannot be read"), (("", key), "TLS_CERT cannot be read"),
        ((cert, live / "none"), "none cannot be read: give TLS_CERT and TLS_KEY, as root if they are root's"),
        ((key, key), "is not a certificate"), ((cert, cert), "is not a key"),
        ((cert, made / "tls.key"), "is not the key of"),
    ]:  # fmt: skip
        done = secrets(made, "llm.example.org", *given)
        assert done.returncode and said in done.stderr and done.stderr.count("\n") == 1
    assert [file.read_bytes() for file in sorted(made.iterdir())] == before


def test_make_secrets_lets_the_containers_read_what_they_mount(checkout: Path, live: Path) -> None:
    shutil.copytree(ROOT / "ops", checkout / "ops")
    (checkout / "nginx.conf").write_text("")
    for file in (checkout / "nginx.conf", checkout / "ops/nginx-conf", checkout / "ops/grafana"):
        file.chmod(0o700 if file.is_dir() else 0o600)
    done = make(checkout, "secrets", f"TLS_CERT={live}/fullchain.pem", f"TLS_KEY={live}/privkey.pem")
    assert done.returncode == 0, done.stderr
    assert (checkout / "secrets/tls.key").read_bytes() == (live / "privkey.pem").read_bytes()
    modes = [(checkout / name).stat().st_mode & 0o777 for name in ("nginx.conf", "ops/nginx-conf", "ops/grafana")]
    assert modes == [0o644, 0o644, 0o755]
