"""How processes of one machine find each other and talk: registry, request channel, event stream.

In come entries, messages and batches of the wire plane; out come the same at other processes, or the news that somebody has gone. Nothing
here knows what a request means, and nothing is retried behind the caller's back.
"""

from polyphase.runtime.channel import Delivery, PeerId, WorkerClient, WorkerServer
from polyphase.runtime.deaths import DeathWatch
from polyphase.runtime.fence import EventSink, StreamCounts, StreamView
from polyphase.runtime.paths import WorkerPaths
from polyphase.runtime.registry import Joined, Lease, Left, Registry, RegistryChange, Updated
from polyphase.runtime.repeats import Repeats
from polyphase.runtime.role_switch import Moving, Settled, Switched, switch_role
from polyphase.runtime.stream import AskedHistory, EventPublisher, EventSubscriber, History

__all__ = [
    "AskedHistory",
    "DeathWatch",
    "Delivery",
    "EventPublisher",
    "EventSink",
    "EventSubscriber",
    "History",
    "Joined",
    "Lease",
    "Left",
    "Moving",
    "PeerId",
    "Registry",
    "RegistryChange",
    "Repeats",
    "Settled",
    "StreamCounts",
    "StreamView",
    "Switched",
    "Updated",
    "WorkerClient",
    "WorkerPaths",
    "WorkerServer",
    "switch_role",
]
