"""Which processes belong to the engine behind a worker."""

from __future__ import annotations

from pathlib import Path

from polyphase.testing import Deployment


def engine_pids(served: Deployment, worker_id: str, name: str = "") -> list[int]:
    """Of the group behind the worker's guard, the first one first; `name` is part of what they call themselves."""
    stats = _stats()
    worker = served.workers()[worker_id].pid
    guards = {pid for pid, (parent, _, _) in stats.items() if parent == worker and b"served.guard" in _command_line(pid)}
    groups = {pid for pid, (parent, _, _) in stats.items() if parent in guards}
    return sorted(pid for pid, (_, group, command) in stats.items() if group in groups and name in command)


def _stats() -> dict[int, tuple[int, int, str]]:
    """Parent, group and name of every process that is not dead."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command, _, rest = (folder / "stat").read_text().rpartition(")")
            except OSError:
                continue
            state, parent, group = rest.split()[:3]
            if state != "Z":
                found[int(folder.name)] = (int(parent), int(group), command.partition("(")[2])
    return found


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
