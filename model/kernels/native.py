"""Builds kernels/*.cpp once for the processor at hand, and registers what they compute with PyTorch."""

import hashlib
import logging
import os
import platform
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_log = logging.getLogger(__name__)

LANES = 8  # rows of a packed matrix that product.cpp computes together

_HERE = Path(__file__).parent
_TORCH = Path(torch.__file__).parent
# No -ffast-math: what is not finite has to stay visible, and a shared object with it turns denormals off for everybody.
_FLAGS = (
    "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-std=c++20", "-Wno-ignored-attributes",
)  # fmt: skip

_loaded = False


def load(folder: Path) -> bool:
    """Whether what kernels/*.cpp define in torch.ops.slots can be used from here on; `folder` keeps what was built.

    False, with the reason in the log, on a processor without AVX2, without a C++ compiler, or when building fails.
    """
    global _loaded
    suitable = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if _loaded or not suitable:
        return _loaded
    try:
        library = folder / f"kernels-{_fingerprint()}.so"
        if not library.exists():
            _log.info("building the CPU kernels, once for this processor")
            _build(library)
        torch.ops.load_library(library)
        _loaded = True
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        reason = " ".join([str(error), *said[:1]])
        _log.warning("the CPU kernels cannot be built, serving several times slower (apt install g++): %s", reason)
    return _loaded


def _fingerprint() -> str:
    """Changes with the sources, the way they are built, and the processor they are built for."""
    flags = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("flags")][:1]
    sources = [file.read_text() for file in sorted(_HERE.iterdir()) if file.suffix in (".cpp", ".h")]
    facts = [torch.__version__, flags or platform.processor(), _FLAGS, *sources]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _build(library: Path) -> None:
    """Raises OSError without a compiler or a writable folder, SubprocessError when compiling fails."""
    begin = time.monotonic()
    library.parent.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX") or "g++"
    with tempfile.TemporaryDirectory(dir=library.parent) as place, ThreadPoolExecutor() as pool:
        objects = {source: Path(place) / f"{source.stem}.o" for source in _HERE.glob("*.cpp")}
        commands = [[compiler, *_FLAGS, f"-I{_TORCH / 'include'}", "-c", source, "-o", made]
                    for source, made in objects.items()]  # fmt: skip
        list(pool.map(_run, commands))
        linked = Path(place) / library.name
        _run([compiler, "-shared", *objects.values(), f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-pthread", "-o", linked])
        os.replace(linked, library)
    _log.info("built the CPU kernels in %.0f s", time.monotonic() - begin)


def _run(command: list[str | Path]) -> None:
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=300)  # usually 5
