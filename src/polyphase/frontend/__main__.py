"""Composition root of a frontend process: puts it together from its flags and runs it until SIGTERM.

Exit codes: 0 drained; 1 something given to it is wrong (one sentence on standard error); 2 a flag is wrong; 70 it broke down and may
be started again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import uvloop

from polyphase.config.router import parse_names, parse_weights, parts_of
from polyphase.core.errors import ConfigurationError
from polyphase.frontend.app import build_app
from polyphase.frontend.dispatch import Dispatcher
from polyphase.frontend.endpoints import Services
from polyphase.frontend.fleet import Fleet
from polyphase.frontend.grammar_checks import GrammarChecks
from polyphase.frontend.metrics import Metrics
from polyphase.frontend.models import Models
from polyphase.frontend.records import Records
from polyphase.frontend.server import HttpServer, open_socket
from polyphase.frontend.settings import FrontendSettings
from polyphase.observe.logs import LEVELS, configure_logging
from polyphase.router import (
    FILTERS,
    POLICIES,
    AdmissionSettings,
    IndexSettings,
    PolicySettings,
    PullRule,
    Router,
    RouterSettings,
    SessionRule,
    SplitRule,
)
from polyphase.router.tenants import parse_tenant_weights
from polyphase.runtime import Registry
from polyphase.runtime.lifeline import Lifeline

log = logging.getLogger("polyphase.frontend")

EXIT_CONFIGURATION = 1
EXIT_BROKEN = 70  # Source: EX_SOFTWARE of sysexits.h
LIFELINE_CHECK_INTERVAL_S = 1.0


def _parser() -> argparse.ArgumentParser:
    http, router, split = FrontendSettings(), RouterSettings(), SplitRule()
    parser = argparse.ArgumentParser(prog="python -m polyphase.frontend", description="OpenAI-compatible HTTP server of a deployment.")
    add = parser.add_argument
    add("--run-folder", type=Path, required=True, help="private folder of the deployment, with the registry of its workers")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add("--policy", default=router.policy.name, help=f"how workers are chosen: {', '.join(POLICIES)} (default: %(default)s)")
    add(
        "--router-weights",
        default="",
        metavar="PART=WEIGHT,…",
        help="of the policy's scorers, and of others, in place of its own; 0 switches one off (default: the policy's)",
    )
    add(
        "--router-filters",
        default="",
        metavar="NAME,…",
        help=f"besides those of every policy: {', '.join(FILTERS)} (default: none)",
    )
    add("--router-picker", default=router.policy.picker, metavar="NAME", help="default: %(default)s")
    add(
        "--router-temperature",
        type=float,
        default=router.policy.temperature,
        metavar="T",
        help="0: always the best worker; 1: half the score, half as often (default: %(default)g)",
    )
    add(
        "--session-idle-s",
        type=float,
        default=router.sessions.idle_ns / 1e9,
        metavar="S",
        help="how long the router remembers where a session was (default: %(default)g)",
    )
    add(
        "--split-threshold",
        type=int,
        metavar="TOKENS",
        help="prompts with fewer tokens to compute are not split, and all others are (default: from 256 on, where it pays)",
    )
    add(
        "--split-fraction",
        type=float,
        default=split.min_uncached_fraction,
        metavar="F",
        help="nor are those of which less than this is to compute (default: %(default)g)",
    )
    add(
        "--max-waiting-requests",
        type=int,
        default=router.max_waiting_requests,
        metavar="N",
        help="per worker, beyond those it runs; when all are full, requests wait here (default: %(default)s)",
    )
    _add_index_flags(parser)
    _add_admission_flags(parser)
    add("--request-timeout-s", type=float, default=http.request_timeout_s, metavar="S", help="then 504 (default: %(default)g)")
    add(
        "--migration-limit",
        type=int,
        default=http.migration_limit,
        metavar="N",
        help="how often a sequence may be taken up by another worker (default: %(default)s)",
    )
    add(
        "--kv-pull",
        choices=("on", "off"),
        default="on",
        help="off: what another worker holds of a prompt is computed again where the request goes (default: %(default)s)",
    )
    add(
        "--kv-flow",
        choices=("on", "off"),
        default="on",
        help="off: a split prompt's KV goes to the decode worker when all of it is computed (default: %(default)s)",
    )
    add("--max-body-bytes", type=int, default=http.max_body_bytes, metavar="BYTES", help="larger bodies get 413 (default: %(default)s)")
    add(
        "--drain-timeout-s",
        type=float,
        default=http.drain_timeout_s,
        metavar="S",
        help="after SIGTERM, running requests get this long (default: %(default)g)",
    )
    add("--log-level", choices=LEVELS, default="info", help="default: %(default)s")
    return parser


def _add_index_flags(parser: argparse.ArgumentParser) -> None:
    usual, add = IndexSettings(), parser.add_argument
    add(
        "--kv-events",
        choices=("on", "off"),
        default="on",
        help="off: go by what was sent to a worker, not by what it tells of its blocks (default: %(default)s)",
    )
    add(
        "--predicted-lifetime-s",
        type=float,
        default=usual.predicted_lifetime_ns / 1e9,
        metavar="S",
        help="how long it does, for workers that tell nothing (default: %(default)g)",
    )
    add("--index-capacity", type=int, metavar="BLOCKS", help="what the prefix index holds at most (default: 4000000)")


def _add_admission_flags(parser: argparse.ArgumentParser) -> None:
    usual, add = AdmissionSettings(), parser.add_argument
    add(
        "--max-queued-requests",
        type=int,
        default=usual.max_requests,
        metavar="N",
        help="waiting here for the same workers while all of these are saturated; 0: none (default: %(default)s)",
    )
    add("--max-queued-per-tenant", type=int, metavar="N", help="of these, of one tenant (default: no limit of its own)")
    add(
        "--max-queue-wait-s",
        type=float,
        default=usual.max_wait_s,
        metavar="S",
        help="requests that cannot begin by then get 429 (default: %(default)g)",
    )
    add("--tenant-weights", default="", metavar="NAME=WEIGHT,…", help="shares of tenants while requests wait (default: 1 each)")


def _admission(flags: argparse.Namespace) -> AdmissionSettings:
    """Raises: ConfigurationError."""
    try:
        weights = parse_tenant_weights(flags.tenant_weights)
    except ValueError as error:
        raise ConfigurationError(f"--tenant-weights: {error}") from None
    if flags.max_queued_per_tenant is not None and flags.max_queued_per_tenant < 1:
        raise ConfigurationError(f"--max-queued-per-tenant must be at least 1, not {flags.max_queued_per_tenant}")
    return AdmissionSettings(flags.max_queued_requests, flags.max_queued_per_tenant, flags.max_queue_wait_s, weights)


def _settings(flags: argparse.Namespace) -> tuple[FrontendSettings, RouterSettings]:
    """Raises: ConfigurationError."""
    for name, least in (
        ("port", 0),
        ("max_waiting_requests", 0),
        ("max_queued_requests", 0),
        ("max_queue_wait_s", 0.001),
        ("predicted_lifetime_s", 1e-6),
        ("migration_limit", 0),
        ("max_body_bytes", 1),
        ("request_timeout_s", 0.001),
        ("drain_timeout_s", 0),
        ("split_fraction", 0),
        ("session_idle_s", 0),
    ):
        if not getattr(flags, name) >= least:
            raise ConfigurationError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(flags, name)}")
    if flags.split_threshold is not None and flags.split_threshold < 0:
        raise ConfigurationError(f"--split-threshold must be at least 0, not {flags.split_threshold}")
    if flags.port > 65535:
        raise ConfigurationError(f"--port must be at most 65535, not {flags.port}")
    http = FrontendSettings(
        max_body_bytes=flags.max_body_bytes,
        request_timeout_s=flags.request_timeout_s,
        migration_limit=flags.migration_limit,
        kv_flow=flags.kv_flow == "on",
        drain_timeout_s=flags.drain_timeout_s,
        admission=_admission(flags),
    )
    if flags.split_threshold is None:
        split = SplitRule(min_uncached_fraction=flags.split_fraction, is_weighed=True)
    else:
        split = SplitRule(flags.split_threshold, flags.split_fraction)
    try:
        weights, filters = parse_weights(flags.router_weights), parse_names(flags.router_filters)
    except ValueError as error:
        raise ConfigurationError(f"--router-weights or --router-filters: {error}") from None
    policy = PolicySettings(flags.policy, weights, flags.router_temperature, filters, flags.router_picker)
    first_turn = secrets.randbelow(1 << 16)  # so that several frontends do not break the same tie for the same worker
    if flags.index_capacity is not None and flags.index_capacity < 1:
        raise ConfigurationError(f"--index-capacity must be at least 1 block, not {flags.index_capacity}")
    index = IndexSettings(flags.index_capacity, flags.kv_events == "on", int(flags.predicted_lifetime_s * 1e9))
    sessions = SessionRule(idle_ns=int(flags.session_idle_s * 1e9))
    router = RouterSettings(policy, split, first_turn, flags.max_waiting_requests, sessions, index, PullRule(flags.kv_pull == "on"))
    return http, router


async def serve(
    run_folder: Path, host: str, port: int, settings: FrontendSettings, router_settings: RouterSettings, lifeline: Lifeline
) -> None:
    """A whole frontend until SIGTERM or SIGINT. Raises: ConfigurationError."""
    listener = open_socket(host, port)
    router = Router(router_settings, parts=parts_of(router_settings.policy))
    models, metrics = Models(), Metrics()
    fleet = Fleet(Registry(run_folder), router, models, settings)
    dispatcher = Dispatcher(router, fleet.send, metrics, settings)
    grammars = GrammarChecks(settings.grammar_cpu_s)
    services = Services(
        models,
        dispatcher,
        Records(settings.record_count),
        metrics,
        settings,
        grammars,
        streams=fleet.streams,
        turned_away=fleet.turned_away,
    )
    server = HttpServer(build_app(services, router), services, listener)
    server.install_signal_handlers()
    async with asyncio.TaskGroup() as tasks:
        helpers = [
            tasks.create_task(fleet.run(dispatcher), name="fleet"),
            tasks.create_task(_stop_when_cut(lifeline, server), name="lifeline"),
        ]
        await server.run()
        for helper in helpers:
            helper.cancel()
    grammars.close()


async def _stop_when_cut(lifeline: Lifeline, server: HttpServer) -> None:
    """Where the kernel tells of the parent's end by a signal, this only mends what happened before it was asked to."""
    while True:
        await asyncio.sleep(LIFELINE_CHECK_INTERVAL_S)
        if lifeline.is_cut():
            server.stop()
            return


def main() -> int:
    lifeline = Lifeline()
    flags = _parser().parse_args()
    configure_logging("frontend", flags.log_level)
    exit_code = 0
    try:
        settings, router_settings = _settings(flags)
        uvloop.run(serve(flags.run_folder, flags.host, flags.port, settings, router_settings, lifeline))
    except* ConfigurationError as group:
        for error in _leaves(group):
            log.error("%s", error)
        exit_code = EXIT_CONFIGURATION
    except* Exception:
        log.exception("the frontend broke down")
        exit_code = EXIT_BROKEN
    return exit_code


def _leaves(group: BaseExceptionGroup[ConfigurationError]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


if __name__ == "__main__":
    sys.exit(main())
