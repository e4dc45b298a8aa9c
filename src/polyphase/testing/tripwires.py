"""Workers of a real deployment killed (-9) or stopped at chosen moments of their work, rather than at any time.

    wires = Tripwires(Path(folder))
    with Deployment("demo", "--prefill", "1", "--decode", "1", environment=planted_environment(folder)) as served:
        wires.order("kill", "reading", pid)  # when that worker is about to read another's blocks, it is no more
        ...
        assert wires.carried_out() == [Trip("kill", "reading", pid)]

Whoever ordered a stop lets the process go on (SIGCONT). An order is carried out once.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

from polyphase.testing.planting import plant

Action = Literal["kill", "stop"]
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(frozen=True, slots=True)
class Moment:
    """The beginning of a call, or its end."""

    module: str
    owner: str
    method: str
    is_after: bool = False


_HOST, _AHEAD = ("polyphase.worker.host", "WorkerHost"), ("polyphase.worker.pulls_ahead", "PullsAhead")
MOMENTS = {
    "accepting": Moment(*_HOST, "_accept"),
    "part-told": Moment("polyphase.engines.batching.exports", "BlockExports", "show", is_after=True),  # a chunk is done, and not sent yet
    "part-heard": Moment(*_AHEAD, "add"),
    "offering": Moment(*_HOST, "_lend", is_after=True),  # the prompt is done, its blocks leased, and nobody knows yet
    "opening": Moment("polyphase.worker.sources", "OfferSources", "open"),
    "reading": Moment("polyphase.transfer.source", "PeerBlocks", "read_blocks"),
    "read": Moment("polyphase.transfer.source", "PeerBlocks", "read_blocks", is_after=True),  # copied, and not taken in yet
    "handing-back": Moment(*_HOST, "_hand_over"),
    "switching": Moment(*_HOST, "_take_role"),
    "switched": Moment(*_HOST, "_take_role", is_after=True),  # the registry shows it, and whoever wished it was not answered
    "finishing": Moment(*_HOST, "_finish"),
}


@dataclass(frozen=True, slots=True)
class Trip:
    action: Action
    moment: str
    pid: int


class Tripwires:
    """The side that gives the orders. `folder` must outlive the deployment; its owner removes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._numbers = count()
        for name in ("trips", "tripped"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        plant(self._folder, __name__)

    def order(self, action: Action, moment: str, pid: int) -> None:
        """Raises: ValueError if there is no such action or moment."""
        if action not in get_args(Action) or moment not in MOMENTS:
            raise ValueError(f"there is no {action!r} at {moment!r}; actions: {', '.join(get_args(Action))}; moments: {', '.join(MOMENTS)}")
        (self._folder / "trips" / f"{next(self._numbers):06}.{action}.{moment}.{pid}").touch()

    def pending(self) -> list[Trip]:
        return _trips(self._folder / "trips")

    def withdraw(self) -> None:
        """What was not carried out yet never will be."""
        for path in (self._folder / "trips").iterdir():
            path.unlink(missing_ok=True)

    def carried_out(self) -> list[Trip]:
        """In the order of the orders."""
        return _trips(self._folder / "tripped")


def install(folder: Path) -> None:
    """In a worker's process."""
    for name, moment in MOMENTS.items():
        owner = getattr(importlib.import_module(moment.module), moment.owner)
        setattr(owner, moment.method, _watched(getattr(owner, moment.method), name, moment, folder))


def _watched(method: Callable[..., Any], name: str, moment: Moment, folder: Path) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        if not moment.is_after:
            _trip(folder, name)
        result = method(*args, **options)
        if moment.is_after:
            _trip(folder, name)
        return result

    return call


def _trip(folder: Path, moment: str) -> None:
    mine = f".{moment}.{os.getpid()}"
    for name in os.listdir(folder / "trips"):
        if name.endswith(mine):
            try:
                os.rename(folder / "trips" / name, folder / "tripped" / name)
            except FileNotFoundError:  # another thread was faster, or it was withdrawn
                continue
            os.kill(os.getpid(), _SIGNALS[name.split(".")[1]])


def _trips(folder: Path) -> list[Trip]:
    parts = [name.split(".") for name in sorted(os.listdir(folder))]
    return [Trip(action, moment, int(pid)) for _, action, moment, pid in parts]  # type: ignore[arg-type]
