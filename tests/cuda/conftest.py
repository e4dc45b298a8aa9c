"""These tests need a CUDA device. `make test` runs them where there is one; `make test-cuda` insists."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available() and os.environ.get("POLYPHASE_REQUIRE_CUDA") != "1":
    collect_ignore_glob = ["test_*.py"]
