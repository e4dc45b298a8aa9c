"""Digital twin: a fleet in virtual time, around the very code that serves.

In come a load (requests with their arrival times) and a fleet's settings; out go what each request saw and what each worker did. The
routers, schedulers, block pools and prefix caches are the real ones; what is imagined is the time that steps and messages take. One
seed, one outcome: there is no clock and no task here, only a heap of what happens when.
"""

from polyphase.twin.fleet import Fleet, FleetSettings, simulate
from polyphase.twin.load import ChatShape, Conversation, Turn, burst_load, chat_load, mooncake_load
from polyphase.twin.measures import Measures, RequestRecord, measure
from polyphase.twin.timeline import Timeline

__all__ = [
    "ChatShape",
    "Conversation",
    "Fleet",
    "FleetSettings",
    "Measures",
    "RequestRecord",
    "Timeline",
    "Turn",
    "burst_load",
    "chat_load",
    "measure",
    "mooncake_load",
    "simulate",
]
