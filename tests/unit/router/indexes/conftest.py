from __future__ import annotations

from collections.abc import Callable

import pytest

from polyphase.core import native
from polyphase.router import PrefixIndex
from polyphase.router.indexes import NaivePrefixIndex, PredictedPrefixIndex, native_index

collect_ignore = [] if native.is_native() else ["test_native_states.py"]

MAKERS: dict[str, Callable[[int], PrefixIndex]] = {"naive": NaivePrefixIndex, "predicted": PredictedPrefixIndex}
if native.is_native():
    MAKERS["native"] = native_index


@pytest.fixture(params=sorted(MAKERS))
def make_index(request: pytest.FixtureRequest) -> Callable[[int], PrefixIndex]:
    return MAKERS[request.param]


@pytest.fixture
def index(make_index: Callable[[int], PrefixIndex]) -> PrefixIndex:
    return make_index(100_000)
