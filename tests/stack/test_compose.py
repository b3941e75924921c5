"""docker-compose.yml, the image and the unit against the secure defaults that the README promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops.stack import ROOT
from settings import Settings
from telemetry import Metrics
from tests.conftest import program

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service["deploy"]["resources"]["limits"]) == {"memory", "pids"}
    assert service["image"] == "flask-llm" or re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+(-alpine)?", service["image"])


def test_only_nginx_can_be_reached_from_outside() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"nginx": ["80:8080", "443:8443"], "grafana": ["127.0.0.1:3000:3000"]}


def test_redis_and_the_app_s_inside_are_on_networks_without_a_way_out() -> None:
    inner = {name for name, network in COMPOSE["networks"].items() if network.get("internal")}
    assert set(SERVICES["redis"]["networks"]) | set(SERVICES["prometheus"]["networks"]) <= inner


def test_prometheus_is_on_the_network_that_may_read_metrics(tmp_path: Path) -> None:
    (inner,) = SERVICES["prometheus"]["networks"]
    assert inner in SERVICES["api"]["networks"]
    environment, networks = configured(tmp_path, INNER_SUBNET="10.9.0.0/24", METRICS_NETWORKS="10.8.0.0/16")
    assert environment["METRICS_NETWORKS"] == "10.8.0.0/16,10.9.0.0/24"
    assert networks[inner]["ipam"]["config"] == [{"subnet": "10.9.0.0/24"}]


def test_nginx_sees_the_addresses_of_ipv6_clients_and_the_app_only_nginx_s(tmp_path: Path) -> None:
    _, networks = configured(tmp_path)
    assert networks["edge"]["enable_ipv6"] and "enable_ipv6" not in networks["inner"]
    assert re.findall(r"listen (.*?);", (ROOT / "nginx.conf").read_text()) == [
        "8080 default_server", "[::]:8080 default_server", "8443 ssl default_server", "[::]:8443 ssl default_server",
    ]  # fmt: skip
    assert configured(tmp_path, EDGE_IPV6="false")[1]["edge"]["enable_ipv6"] is False


def test_files_of_the_host_can_be_read_inside_under_selinux_and_any_umask() -> None:
    binds = [bind for service in SERVICES.values() for bind in service.get("volumes", ()) if bind.startswith("./")]
    assert len(binds) == 5 and all(bind.endswith(":ro,z") for bind in binds)
    copies = re.findall(r"^COPY (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert copies == ["--chmod=644 requirements.txt .", "--chmod=755 . ."]


def configured(folder: Path, **env: str) -> tuple[dict[str, str], dict[str, Any]]:
    """What docker compose makes of a checkout with this .env: the app's environment, and the networks."""
    (folder / "secrets").mkdir(exist_ok=True)
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
    command = [Path(sys.executable).parent / "docker-compose", "-f", ROOT / "docker-compose.yml", "--project-directory"]
    plain = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    done = subprocess.run([*command, folder, "config"], env=plain, capture_output=True, text=True, check=True)
    told = yaml.safe_load(done.stdout)
    return told["services"]["api"]["environment"], told["networks"]


# What compose itself decides: addresses inside, and secrets that come as files.
PINNED = {
    "HOST": "0.0.0.0", "PORT": "5000", "DATA_DIR": "/data", "TRUSTED_PROXIES": "1", "KEY_FILE": "/run/secrets/keys",
    "JWT_SECRET_FILE": "/run/secrets/jwt_secret", "REDIS_URL_FILE": "/run/secrets/redis_url",
    "ADMIN_PASSWORD_FILE": "/run/secrets/admin_password",
}  # fmt: skip


def test_every_setting_of_env_reaches_the_app_but_those_that_compose_decides(tmp_path: Path) -> None:
    theirs = {"HTTPS_PROXY", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "SSL_CERT_FILE"}
    given = {name: f"of-{name}" for name in {name.upper() for name in Settings.model_fields} | theirs}
    environment, _ = configured(tmp_path, **given)
    reached = {name for name, value in given.items() if value in environment.get(name, "").split(",")}
    assert {name: environment[name] for name in PINNED} == PINNED
    kept = {name for name in PINNED if not name.endswith(("_URL_FILE", "_PASSWORD_FILE"))}
    assert given.keys() - reached == kept
    for document in ("docker-compose.yml", "docs/operations.md"):
        (named,) = re.findall(r"All of `?\.env.*?set(?:s| here)\.", (ROOT / document).read_text(), re.DOTALL)
        assert kept <= set(re.findall(r"[A-Z]+(?:_[A-Z]+)*", named)), document


def test_without_an_env_file_the_defaults_of_compose_hold(tmp_path: Path) -> None:
    environment, _ = configured(tmp_path)
    chosen = {"MODEL": "deepseek-r1-distill-qwen-14b", "DEVICE": "cuda", "PRELOAD": "true"}
    assert chosen.items() <= environment.items()  # a GPU that is not there ends the start, not in a 14B on the CPU
    added = {"ALLOWED_HOSTS", "METRICS_NETWORKS", "HF_HUB_OFFLINE"}
    assert set(environment) <= PINNED.keys() | chosen.keys() | added
    (gpu,) = SERVICES["api"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu["capabilities"] == ["gpu", "compute", "utility"]  # utility: NVML, of which DEVICE's checks ask


def test_every_secret_is_a_file_that_make_secrets_makes(tmp_path: Path) -> None:
    subprocess.run([ROOT / "ops/make-secrets", tmp_path / "secrets"], check=True, capture_output=True)
    made = {f"./secrets/{file.name}" for file in (tmp_path / "secrets").iterdir()}
    assert {secret["file"] for secret in COMPOSE["secrets"].values()} == made
    used = {name for service in SERVICES.values() for name in service.get("secrets", ())}
    assert used == set(COMPOSE["secrets"])


def test_the_app_is_given_settings_that_exist_and_time_to_drain() -> None:
    given = {name.lower() for name in SERVICES["api"]["environment"]}
    files = {"redis_url_file", "admin_password_file"}
    assert given - set(Settings.model_fields) == {"hf_hub_offline"} | files  # the first is the hub's own
    grace = Settings.model_fields["grace_period"].default
    assert int(SERVICES["api"]["stop_grace_period"].removesuffix("s")) > grace
    timeout = Settings.model_fields["request_timeout"].default
    assert int(SERVICES["nginx"]["stop_grace_period"].removesuffix("s")) > timeout


def test_the_image_takes_every_package_of_the_service_and_nothing_else() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    taken = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    assert taken == packages | {"requirements.txt", "*.py", "web"}


def test_the_dashboard_asks_only_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "ops/grafana/dashboards/service.json").read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    names = set(re.findall(r"\b(?:llm|process|python)_\w+", asked))
    known = {sample.name for metric in Metrics().registry.collect() for sample in metric.samples}
    labelled = {"llm_requests_finished_total", "llm_cache_lookups_total"}  # no sample before the first event
    assert "process_resident_memory_bytes" in names and names - labelled <= known


def test_the_unit_reads_what_make_secrets_makes(tmp_path: Path) -> None:
    unit = (ROOT / "ops/systemd/flask-llm.service").read_text()
    made = subprocess.run(
        [ROOT / "ops/make-secrets", tmp_path / "s"], check=True, capture_output=True, text=True
    ).stdout
    read = dict(re.findall(r"^LoadCredential=(\w+):/etc/flask-llm/(\w+)$", unit, re.MULTILINE))
    assert "admin_password" in read and f"{tmp_path}/s/admin_password" in made
    for name, file in read.items():
        assert (tmp_path / "s" / file).is_file() and re.search(rf"[A-Z_]+_FILE=%d/{name}\b", unit)


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = tmp_path / "flask-llm.service"
    text = (ROOT / "ops/systemd/flask-llm.service").read_text()
    unit.write_text(text.replace("/opt/flask-llm/.venv/bin/gunicorn", "/bin/true"))
    checked = subprocess.run([program("systemd-analyze"), "verify", unit], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
