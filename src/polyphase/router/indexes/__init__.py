"""Which worker holds which prefixes: several ways to know it, one contract (`router.types.PrefixIndex`), one set of tests for all.

naive      Python sets: the truth that the others are tested against
native     the C++ extension: what serves, where it could be built
predicted  no events: what was routed somewhere is believed to be there for a while
"""

from polyphase.core.native import is_native
from polyphase.router.indexes.naive import NaivePrefixIndex
from polyphase.router.indexes.native import DEFAULT_CAPACITY, native_index
from polyphase.router.indexes.predicted import DEFAULT_CAPACITY as DEFAULT_BELIEF_CAPACITY
from polyphase.router.indexes.predicted import PredictedPrefixIndex
from polyphase.router.types import PrefixIndex

__all__ = ["DEFAULT_BELIEF_CAPACITY", "DEFAULT_CAPACITY", "NaivePrefixIndex", "PredictedPrefixIndex", "default_index", "native_index"]


def default_index(capacity: int = DEFAULT_CAPACITY) -> PrefixIndex:
    """The fastest that this installation has; `capacity` in blocks."""
    return native_index(capacity) if is_native() else NaivePrefixIndex(capacity)
