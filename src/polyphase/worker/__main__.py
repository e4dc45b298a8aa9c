"""Composition root of a worker process: claims its name, loads the engine, serves until drained.

Exit codes: 0 drained; 1 something given to it is wrong (one sentence on standard error); 2 a flag is wrong; 70 it broke down and may
be started again.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import uvloop

from polyphase.core.errors import ConfigurationError, EngineFailed
from polyphase.engines.interface import Engine
from polyphase.observe import configure_logging
from polyphase.runtime import Lease, Registry, WorkerPaths
from polyphase.runtime.deaths import start_ticks
from polyphase.runtime.lifeline import Lifeline
from polyphase.runtime.paths import ensure_private_folder
from polyphase.wire.cards import WorkerEntry
from polyphase.wire.events import KvEvent
from polyphase.worker.engines import check_adapters, load_engines
from polyphase.worker.host import HostSettings, WorkerHost, engine_failure
from polyphase.worker.options import WorkerOptions, parse_options
from polyphase.worker.room import QueueLimits
from polyphase.worker.transfer import join_transfer
from polyphase.worker.warm_up import warm_up

log = logging.getLogger("polyphase.worker")

EXIT_CONFIGURATION = 1
EXIT_BROKEN = 70  # Source: EX_SOFTWARE of sysexits.h
LIFELINE_CHECK_INTERVAL_S = 1.0
SAME_WISH_S = 1.0
DISK_TROUBLES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


def main() -> int:
    lifeline = Lifeline()
    options = parse_options(sys.argv[1:])
    # While the model loads, a signal ends the process at once, wherever it is: nothing outlives it but a claim that the kernel gives free.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        configure_logging(options.worker_id, options.log_level)
        _serve(options, lifeline)
    except ConfigurationError as error:
        log.error("%s", error.message)
        return EXIT_CONFIGURATION
    except EngineFailed as error:
        log.error("the worker broke down: %s", error.message)
        return EXIT_BROKEN
    except Exception as error:
        if (told := _disk_trouble(error)) is not None:
            what = f"{told.filename or options.run_folder} cannot be written: {told.strerror}"
            log.error("the worker ends; it can be started again when there is room: %s", what)
        else:
            log.exception("the worker broke down")
        return EXIT_BROKEN
    log.info("gone")
    return 0


def _disk_trouble(error: BaseException) -> OSError | None:
    """The error, or one of its group, that says that a disk takes nothing more: no fault of the worker's."""
    if isinstance(error, BaseExceptionGroup):
        return next((told for one in error.exceptions if (told := _disk_trouble(one)) is not None), None)
    return error if isinstance(error, OSError) and error.errno in DISK_TROUBLES else None


def _serve(options: WorkerOptions, lifeline: Lifeline) -> None:
    with ExitStack() as stack:
        names = (options.worker_id, *options.beside)
        leases = [stack.enter_context(Registry(options.run_folder).claim(name)) for name in names]
        paths = [WorkerPaths.of(options.run_folder, name) for name in names]
        ensure_private_folder(paths[0].request_socket.parent)
        started_s = time.monotonic()
        log.info("loading %s with engine %s", options.engine_options.model, options.engine)
        loaded = [engine for _ in names for engine in load_engines(options.engine, options.engine_options)]
        engines = [stack.enter_context(closing(engine)) for engine in loaded]
        check_adapters(engines[0], options.engine, options.engine_options.adapters)
        for rank in range(len(names), len(engines)):
            name = f"{options.worker_id}-rank-{rank}"
            leases.append(stack.enter_context(Registry(options.run_folder).claim(name)))
            names, paths = (*names, name), [*paths, WorkerPaths.of(options.run_folder, name)]
        lives = [_Life(*parts) for parts in zip(names, engines, leases, paths, strict=True)]
        stack.enter_context(_long_lived_objects_left_alone())
        log.info("loaded %s in %.1f s", lives[0].engine.card.name, time.monotonic() - started_s)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_host_all(lives, options, lifeline))


@dataclass(frozen=True, slots=True)
class _Life:
    """What one worker of this process has to itself."""

    worker_id: str
    engine: Engine
    lease: Lease
    paths: WorkerPaths


@contextmanager
def _long_lived_objects_left_alone() -> Iterator[None]:
    """A model's library makes a million objects that live as long as the process: no need to look through them again and again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def _host_all(lives: Sequence[_Life], options: WorkerOptions, lifeline: Lifeline) -> None:
    """If one breaks down, the process does: its end is what others know how to deal with."""
    with ExitStack() as stack:  # of the transfer agents, which outlive the hosts
        hosts = [await _host(life, options, stack) for life in lives]
        _drain_on_signals(hosts, lives)
        watch = asyncio.create_task(_drain_when_cut(lifeline, hosts), name="lifeline")
        try:
            async with asyncio.TaskGroup() as tasks:
                for host, life in zip(hosts, lives, strict=True):
                    tasks.create_task(host.run(), name=life.worker_id)
        except BaseExceptionGroup as group:
            if (told := engine_failure(group)) is not None:
                raise told from None
            raise
        finally:
            watch.cancel()


async def _host(life: _Life, options: WorkerOptions, stack: ExitStack) -> WorkerHost:
    engine, paths = life.engine, life.paths
    entry = WorkerEntry(
        worker_id=life.worker_id,
        epoch=time.time_ns(),
        role=life.lease.remembered_role() or options.role,
        model=engine.card.name,
        pid=os.getpid(),
        began_ticks=start_ticks(os.getpid()),
        host=socket.gethostname(),
        request_endpoint=paths.request_endpoint,
        event_endpoint=paths.event_endpoint,
        labels=options.labels,
        aliases=list(options.aliases),
        group=options.group or engine.card.engine,
        weight=options.weight,
    )
    agent, region = stack.enter_context(join_transfer(engine, entry, str(paths.pool_socket), options.transfer))
    events: list[KvEvent] = []
    if engine.card.takes_tokens:
        log.info("warming up")
        events = await warm_up(engine)
    limits = QueueLimits.of_engine(engine.card.max_batch_tokens, options.engine_options.max_waiting, options.max_waiting_prefill_tokens)
    return WorkerHost(engine, life.lease, HostSettings(entry, paths, options.drain_timeout_s, agent, region, limits, tuple(events)))


def _drain_on_signals(hosts: Sequence[WorkerHost], lives: Sequence[_Life]) -> None:
    """The first SIGTERM or SIGINT drains; a later one ends the process at once, but tidily.

    What follows the first within a second is the same wish, sent twice: by the supervisor, and by whoever signalled all processes.
    """
    first_s: float | None = None

    def on_signal() -> None:
        nonlocal first_s
        if first_s is not None:
            if time.monotonic() - first_s < SAME_WISH_S:
                return
            log.warning("asked a second time to end: ending now, requests are broken off")
            for life in lives:
                life.lease.withdraw()
                life.paths.remove()
            os._exit(EXIT_BROKEN)
        first_s = time.monotonic()
        for host in hosts:
            host.drain()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)


async def _drain_when_cut(lifeline: Lifeline, hosts: Sequence[WorkerHost]) -> None:
    """For systems whose kernel does not tell that the supervisor ended."""
    while not lifeline.is_cut():  # noqa: ASYNC110  there is no event for it
        await asyncio.sleep(LIFELINE_CHECK_INTERVAL_S)
    for host in hosts:
        host.drain()


if __name__ == "__main__":
    sys.exit(main())
