"""The mock engine against the contract of all engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import ClassVar

import pytest

from polyphase.engines.interface import Engine
from polyphase.engines.mock.engine import load_mock_engine
from polyphase.testing.engines import EngineConformance
from tests.unit.mock.building import settings


class TestMockEngine(EngineConformance):
    long_token_count: ClassVar[int] = 400

    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        with closing(load_mock_engine(settings())) as engine:
            yield engine
