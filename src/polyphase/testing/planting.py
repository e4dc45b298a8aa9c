"""Puts code of this package into the workers of a real deployment, so that production code knows nothing of it.

`plant` writes a `sitecustomize` into a folder; Python imports that at its start wherever the folder is on PYTHONPATH, and in a worker it
calls `install(folder)` of each planted module. Orders and reports are files in the folder, which outlive workers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_LOADER = '''"""Written by polyphase.testing.planting."""
import sys

if "polyphase.worker" in sys.orig_argv:
    from importlib import import_module
    from pathlib import Path

    for name in {modules!r}:
        import_module(name).install(Path({folder!r}))
'''


def plant(folder: Path, module: str) -> None:
    """`module`: a name to import, with a function `install(folder)`. Several may be planted in one folder."""
    loader = folder / "sitecustomize.py"
    planted = re.findall(r"'([\w.]+)'", re.search(r"for name in (.*):", loader.read_text())[1]) if loader.exists() else []  # type: ignore[index]
    loader.write_text(_LOADER.format(modules=(*planted, module), folder=str(folder)))


def planted_environment(folder: Path) -> dict[str, str]:
    """For `Deployment(environment=…)`."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
