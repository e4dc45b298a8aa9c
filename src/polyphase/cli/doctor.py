"""`polyphase doctor`: looks at what Polyphase needs on this machine, and says how to mend what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyphase.config import format_bytes
from polyphase.core import native
from polyphase.core.errors import ConfigurationError
from polyphase.launch.cores import core_count
from polyphase.launch.ports import is_port_free
from polyphase.launch.run_folder import base_folder
from polyphase.runtime.paths import ensure_private_folder

MIN_OPEN_FILES = 1024
GOOD_MEMORY_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class Finding:
    """`is_fine` is None for what is worth knowing and no fault. `mend` is a sentence or a command."""

    what: str
    is_fine: bool | None
    found: str
    mend: str = ""
    is_essential: bool = False


def show_checks() -> int:
    """Prints all findings. Returns the exit code: 1 if something essential is missing."""
    console = Console(highlight=False)
    findings = list(examine())
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("", "what", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        mark = {True: Text("✓", "green"), None: Text("·", "dim"), False: Text("✗", "red" if finding.is_essential else "yellow")}
        # As Text: in a plain string, rich would take the brackets of 'polyphase[torch]' for markup.
        table.add_row(mark[finding.is_fine], Text(finding.what), Text(finding.found))
    console.print(table)
    to_mend = [finding for finding in findings if not finding.is_fine and finding.mend]
    if to_mend:
        console.print("\nhow to mend it", style="dim")
    for finding in to_mend:  # outside the table, and unbroken: commands are copied from here
        console.print(Text(f"  {finding.what}: {finding.mend}"), soft_wrap=True)
    console.print()
    broken = [finding.what for finding in findings if finding.is_essential and finding.is_fine is False]
    console.print(f"[red]Polyphase cannot serve here yet: {', '.join(broken)}[/]" if broken else "[green]Polyphase can serve here.[/]")
    return 1 if broken else 0


def examine() -> Iterator[Finding]:
    for check in (
        _python, _cores, _memory, _shared_memory, _inotify, _open_files, _run_folder, _port,
        _engine_packages, _tokenizers, _openai, _accelerator, _native_code,
    ):  # fmt: skip
        found = check()
        yield from (found if isinstance(found, list) else [found])


def _python() -> Finding:
    version = platform.python_version()
    is_fine = sys.version_info >= (3, 11)
    return Finding("Python", is_fine, f"{version}, {sys.executable}", "install Python 3.11 or later", is_essential=True)


def _cores() -> Finding:
    cores = core_count()
    return Finding("cores", cores >= 2 or None, str(cores), "with one core, prefill and decode take turns")


def _memory() -> Finding:
    available = _available_memory_bytes()
    if available is None:
        return Finding("memory", None, "unknown on this system")
    is_fine = available >= GOOD_MEMORY_BYTES
    return Finding("memory", is_fine, f"{format_bytes(available)} available", "close other programs, or lower --kv-memory and the workers")


def _available_memory_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _shared_memory() -> Finding:
    mend = "KV blocks move between workers in a memfd, which needs Linux 3.17 or later; without it, serve with --workers only"
    try:
        os.close(os.memfd_create("polyphase-doctor", os.MFD_CLOEXEC))
    except (AttributeError, OSError) as error:
        return Finding("shared memory", False, f"no memfd: {error}", mend, is_essential=True)
    return Finding("shared memory", True, "memfd")


def _inotify() -> Finding:
    path = Path("/proc/sys/fs/inotify/max_user_instances")
    mend = "without inotify, folders are polled: newcomers are seen a little later"
    try:
        import asyncinotify

        with asyncinotify.Inotify():
            return Finding("inotify", True, f"{path.read_text().strip()} instances per user" if path.exists() else "works")
    except ImportError:
        return Finding("inotify", False, "the package asyncinotify is missing", f"pip install asyncinotify; {mend}")
    except OSError as error:
        return Finding("inotify", False, str(error), f"raise fs.inotify.max_user_instances with sysctl; {mend}")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Finding("open files", soft >= MIN_OPEN_FILES, f"{soft} (at most {hard})", "each client takes one; run: ulimit -n 65536")


def _run_folder() -> Finding:
    base = base_folder(os.environ)
    try:
        ensure_private_folder(base)
        probe = base / ".doctor"
        with socket.socket(socket.AF_UNIX) as server:
            probe.unlink(missing_ok=True)
            server.bind(str(probe))
        probe.unlink()
    except ConfigurationError as error:
        return Finding("run folder", False, str(base), error.message, is_essential=True)
    except OSError as error:
        return Finding("run folder", False, f"{base}: {error}", "set XDG_RUNTIME_DIR to a private folder of yours", is_essential=True)
    return Finding("run folder", True, str(base))


def _port() -> Finding:
    is_free = is_port_free("127.0.0.1", 8000)
    return Finding("port 8000", is_free or None, "free" if is_free else "in use", "choose another port: polyphase serve … --port 8001")


def _engine_packages() -> list[Finding]:
    mend = "pip install 'polyphase[torch]'"
    return [
        _package(name, mend, is_essential=True, note="the embedded engine") for name in ("torch", "transformers", "safetensors", "numpy")
    ]


def _tokenizers() -> Finding:
    return _package("tokenizers", "pip install tokenizers", is_essential=True)


def _openai() -> Finding:
    return _package("openai", "pip install openai (for polyphase demo only)")


def _package(name: str, mend: str, *, is_essential: bool = False, note: str = "") -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "missing" + (f" ({note})" if note else ""), mend, is_essential=is_essential)


def _accelerator() -> Finding:
    try:
        import torch
    except (ImportError, OSError):  # OSError: a library that torch needs does not load
        return Finding("accelerator", None, "unknown without torch")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return Finding("accelerator", True, f"{', '.join(names)}, CUDA {torch.version.cuda}")
    return Finding("accelerator", None, "none that torch can use", "models run on the CPU; for a GPU, install torch's CUDA build")


def _native_code() -> Finding:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    mend = "routing works without it, slower; to build it: " + ("" if compiler else "install a C++ compiler and Python's headers, then ")
    return Finding("C++ extension", native.is_native() or None, native.status(), f"{mend}pip install --force-reinstall --no-deps polyphase")
