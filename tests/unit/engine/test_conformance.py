"""The torch engine against the contract of all engines."""

from __future__ import annotations

from typing import ClassVar

import pytest

from polyphase.engines.interface import Engine
from polyphase.testing.engines import EngineConformance
from tests.unit.engine.conftest import MakeEngine


class TestTorchEngine(EngineConformance):
    long_token_count: ClassVar[int] = 1000

    @pytest.fixture
    def engine(self, make_engine: MakeEngine) -> Engine:
        return make_engine()
