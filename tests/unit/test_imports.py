"""The direction of imports between planes, and what a frontend must never load. Source of the order: docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import polyphase

SOURCE = Path(polyphase.__file__).parent

# From the lowest plane to the highest. Planes on one line are strangers to each other; each may import the lines above it.
LAYERS: list[set[str]] = [
    {"core"},
    {"wire"},
    {"router", "kv", "planner", "advisor", "text"},
    {"observe"},
    {"runtime"},
    {"transfer", "tiers"},
    {"engines"},
    {"frontend", "worker"},
    {"launch", "twin", "dashboard"},
    {"cli", "testing"},
]
LEVEL = {plane: level for level, planes in enumerate(LAYERS) for plane in planes}
COMPOSITION_ROOTS = {"cli", "launch"}  # besides every __main__.py: they may read `config`
PURE = {"router", "kv", "planner", "advisor"}
IMPURE_MODULES = {"time", "random", "secrets", "socket", "asyncio", "threading", "os", "pathlib", "subprocess", "datetime", "zmq", "io"}


def modules() -> Iterator[tuple[Path, str]]:
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).parts
        if len(parts) > 1:
            yield path, parts[0]


def runtime_imports(path: Path) -> Iterator[str]:
    """Names of imported modules; those under `if TYPE_CHECKING` count too: a type is a dependency."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def plane_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "polyphase" and len(parts) > 1 else None


def is_allowed(path: Path, plane: str, target: str) -> bool:
    if target == plane:
        return True
    if target == "config":
        return plane in COMPOSITION_ROOTS or path.name == "__main__.py"
    if plane == "config":
        return LEVEL[target] <= LEVEL["observe"]
    return LEVEL[target] < LEVEL[plane]


def test_planes_import_downwards_only() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)} imports {target}"
        for path, plane in modules()
        for target in map(plane_of, runtime_imports(path))
        if target is not None and not is_allowed(path, plane, target)
    ]
    assert not wrong, "imports against the direction in docs/architecture.md:\n" + "\n".join(wrong)


def test_every_plane_is_on_the_map() -> None:
    planes = {plane for _, plane in modules()}
    assert planes <= LEVEL.keys() | {"config"}, f"planes that docs/architecture.md does not know: {planes - LEVEL.keys()}"


def test_deciding_planes_touch_nothing() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)} imports {module}"
        for path, plane in modules()
        if plane in PURE
        for module in runtime_imports(path)
        if module.split(".")[0] in IMPURE_MODULES
    ]
    assert not wrong, "deciding code may use no clock, randomness, task, socket or file:\n" + "\n".join(wrong)


@pytest.mark.parametrize("module", ["polyphase.frontend.__main__", "polyphase.cli", "polyphase.launch"])
def test_front_processes_load_no_model_code(module: str) -> None:
    heavy = ("torch", "transformers", "numpy")
    script = f"import sys, {module}; print(*[m for m in {heavy!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not loaded, f"{module} loads {loaded}"
