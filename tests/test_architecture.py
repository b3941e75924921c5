"""The house's import rule: settings, errors -> telemetry -> db, crypto -> features -> api -> app."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"settings", "errors", "telemetry", "db", "crypto", "version"}
FEATURES = {"model", "accounts", "quotas", "cache", "audit"}
ROOMS = BASE | FEATURES | {"api", "app"}
MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    **dict.fromkeys(FEATURES, BASE),
    "api": BASE | FEATURES,
    "app": ROOMS,
}
TORCH = {"torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "gguf", "tokenizers"}
USES_TORCH = ("model/runtime/", "model/kernels/", "model/weights/", "model/text/")
FILES = [path for room in ROOMS for path in (*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/**/*.py"))]


def imports(path: Path) -> Iterator[str]:
    """The first names of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below_it(path: Path) -> None:
    name, found = str(path.relative_to(ROOT)), set(imports(path))
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert found & ROOMS <= MAY_IMPORT[room] | {room}
    assert room in {"api", "app"} or not any("flask" in module for module in found)
    assert not found & TORCH or name.startswith(USES_TORCH)


def test_importing_the_http_side_loads_no_torch() -> None:
    code = "import sys, app; sys.exit(' '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
