"""Decides which worker runs which phase of a request, from what is cached where and what is booked on whom.

In come worker facts, KV events, load reports and route requests; out go routes with their reasons. It touches no clock, randomness,
socket or task: the frontend feeds it and acts on what it says.
"""

from polyphase.router.admission import AdmissionQueue, AdmissionSettings, EvictReason, Queued, Rejected, RejectReason
from polyphase.router.bookings import Booked, Bookings
from polyphase.router.coverage import can_serve, misfits, shortcomings
from polyphase.router.drift import Drift, DriftReason, Sample, StreamFacts
from polyphase.router.drift_watch import DriftWatch
from polyphase.router.fair_share import Ticket
from polyphase.router.groups import group_weights
from polyphase.router.indexes import NaivePrefixIndex, PredictedPrefixIndex, default_index, native_index
from polyphase.router.parts import BUILT_IN, Parts
from polyphase.router.policies import FILTERS, POLICIES, policy_of
from polyphase.router.pull import reason_of_pull
from polyphase.router.refusals import Refusals, believed_tokens, is_refusal
from polyphase.router.router import Router
from polyphase.router.types import (
    Candidate,
    IndexFill,
    IndexSettings,
    Leg,
    Overlaps,
    Placement,
    PolicySettings,
    PrefixIndex,
    Pull,
    PullRule,
    Route,
    RouteRequest,
    RouterSettings,
    SessionRule,
    SplitRule,
    WorkerFacts,
    WorkerView,
)

__all__ = [
    "BUILT_IN",
    "FILTERS",
    "POLICIES",
    "AdmissionQueue",
    "AdmissionSettings",
    "Booked",
    "Bookings",
    "Candidate",
    "Drift",
    "DriftReason",
    "DriftWatch",
    "EvictReason",
    "IndexFill",
    "IndexSettings",
    "Leg",
    "NaivePrefixIndex",
    "Overlaps",
    "Parts",
    "Placement",
    "PolicySettings",
    "PredictedPrefixIndex",
    "PrefixIndex",
    "Pull",
    "PullRule",
    "Queued",
    "Refusals",
    "RejectReason",
    "Rejected",
    "Route",
    "RouteRequest",
    "Router",
    "RouterSettings",
    "Sample",
    "SessionRule",
    "SplitRule",
    "StreamFacts",
    "Ticket",
    "WorkerFacts",
    "WorkerView",
    "believed_tokens",
    "can_serve",
    "default_index",
    "group_weights",
    "is_refusal",
    "misfits",
    "native_index",
    "policy_of",
    "reason_of_pull",
    "shortcomings",
]
