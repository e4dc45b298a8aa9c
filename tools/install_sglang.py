"""Installs SGLang for CPUs in an environment of its own: `python tools/install_sglang.py FOLDER [PIP ARGUMENTS…]`. Prints its interpreter.

For `make test-engines-sglang`: 3.1 GB. Can be broken off and called again: what is there is not fetched anew. Needs CPython 3.11 on x86-64.
The pins in sglang-cpu-lock.txt leave out CUDA's packages; what SGLang imports of those and never calls, stands in sglang_cpu_stand_ins.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

TORCH = "torch==2.13.0+cpu"
LOCK = Path(__file__).with_name("sglang-cpu-lock.txt")
_ALL_THERE = f"import importlib.metadata as m; [m.version(line.partition('==')[0]) for line in open({str(LOCK)!r})]"
_CAN_TRANSFER = "from mooncake.engine import TransferEngine"
IBVERBS_PACKAGES = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")
STAND_INS = Path(__file__).with_name("sglang_cpu_stand_ins")


def install(folder: Path, pip_arguments: list[str]) -> Path:
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"SGLang's pins are of Python 3.11, and this is {sys.version.split()[0]}: make test-engines-sglang PYTHON=python3.11")
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"making an environment in {folder}")
        venv.create(folder, with_pip=True)
    if not has(python, "import torch"):
        say("installing torch for CPUs")
        pip(python, [*pip_arguments, TORCH])
    if not has(
        python, "import importlib.metadata as m; m.version('sglang'); m.version('zstandard')"
    ):  # the first and the last to be put there
        say("installing SGLang and what it needs")
        pip(python, [*pip_arguments, "--no-deps", "-r", str(LOCK)])
    _put_stand_ins(python)
    if not has(python, _CAN_TRANSFER):
        say("fetching libibverbs, which Mooncake wants even if it goes over TCP")
        _put_ibverbs(folder / "ibverbs")
    if not has(python, _CAN_TRANSFER):
        say("warning: there is no libibverbs.so.1, so disaggregation cannot be tested; on Debian and Ubuntu: apt install libibverbs1")
    return python


def _put_stand_ins(python: Path) -> None:
    packages = Path(subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())
    for source in STAND_INS.iterdir():
        if source.suffix in (".py", ".pth"):
            shutil.copy(source, packages / source.name)


def _put_ibverbs(folder: Path) -> None:
    """From Debian's packages, beside the system: neither needs anybody's rights, nor changes anything outside of the folder."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return
    with tempfile.TemporaryDirectory() as scratch:
        fetched = subprocess.run(["apt-get", "download", *IBVERBS_PACKAGES], cwd=scratch, stdout=sys.stderr, check=False)
        if fetched.returncode:
            return
        for package in Path(scratch).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), scratch], check=True)
        folder.mkdir(exist_ok=True)
        for library in Path(scratch).rglob("lib*.so.*"):
            if not library.is_symlink():
                shutil.copy(library, folder / library.name)
        for library in Path(scratch).rglob("lib*.so.*"):
            if library.is_symlink() and not (folder / library.name).exists():
                (folder / library.name).symlink_to(os.readlink(library))


def has(python: Path, statement: str) -> bool:
    environment = {**os.environ, "SGLANG_CPU_TRANSFER": "1"}
    return subprocess.run([python, "-c", statement], env=environment, capture_output=True, check=False).returncode == 0


def pip(python: Path, arguments: list[str]) -> None:
    subprocess.run([python, "-m", "pip", "install", "--disable-pip-version-check", *arguments], check=True, stdout=sys.stderr)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(install(Path(sys.argv[1]).expanduser(), sys.argv[2:]))
