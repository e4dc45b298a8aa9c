"""Decides which worker runs which phase of a request, from what is cached where and what is booked on whom.

In come worker facts, KV events, load reports and route requests; out go routes with their reasons. It touches no clock, randomness,
socket or task: the frontend feeds it and acts on what it says.
"""

from polyphase.router.bookings import Booked, Bookings
from polyphase.router.coverage import shortcomings
from polyphase.router.drift import Drift, DriftReason, Sample, StreamFacts
from polyphase.router.drift_watch import DriftWatch
from polyphase.router.indexes import NaivePrefixIndex, PredictedPrefixIndex, default_index, native_index
from polyphase.router.policies import POLICIES
from polyphase.router.router import Router
from polyphase.router.types import (
    Candidate,
    Leg,
    Overlaps,
    Placement,
    PrefixIndex,
    Route,
    RouteRequest,
    RouterSettings,
    SplitRule,
    WorkerFacts,
    WorkerView,
)

__all__ = [
    "POLICIES",
    "Booked",
    "Bookings",
    "Candidate",
    "Drift",
    "DriftReason",
    "DriftWatch",
    "Leg",
    "NaivePrefixIndex",
    "Overlaps",
    "Placement",
    "PredictedPrefixIndex",
    "PrefixIndex",
    "Route",
    "RouteRequest",
    "Router",
    "RouterSettings",
    "Sample",
    "SplitRule",
    "StreamFacts",
    "WorkerFacts",
    "WorkerView",
    "default_index",
    "native_index",
    "shortcomings",
]
