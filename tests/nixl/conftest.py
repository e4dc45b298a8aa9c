"""These tests need the package nixl. `make test` runs them where it is installed; `make test-nixl` fetches it."""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("nixl") is None and os.environ.get("POLYPHASE_REQUIRE_NIXL") != "1":
    collect_ignore_glob = ["test_*.py"]
