"""How well requests are placed: TTFT, prefix hits and spread of load of our router, of Dynamo's formula, of round robin and least-loaded.

A fleet of mock workers in virtual time (16 x llama-3.1-70b on four H100 each) serves a trace in Mooncake's form (argument TRACE; played
faster, so that the fleet is nearly full) and chats of several turns under one system prompt. Every policy gets the same requests. At the
end, four frontends with bursts of requests of which half share a hot prefix. Without TRACE, which is not shipped, chats and bursts are
played and it is said what is missing; https://github.com/kvcache-ai/Mooncake has it (conversation_trace.jsonl).

hit rate: prompt tokens found in the cache of the worker that computed them, of all. Ratios `_vs_` are ours over theirs; those without
the name of a load are the worse one of the loads. Overload: tokens that wait at the fullest worker beyond those at an average one.
Our fleet's workers refuse what was sent on a belief that other routers' requests have overtaken (`worker.room`); the others' take all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dynamo_formula import synchronised
from harness import STDERR, Figure, arguments, report
from polyphase.engines.mock import MockSettings
from polyphase.engines.mock.assembly import assemble_mock
from polyphase.launch.model_source import resolve_model
from polyphase.twin import Conversation, FleetSettings, Measures, burst_load, chat_load, mooncake_load, simulate
from polyphase.twin.fleet import MakeRouting, router_of
from polyphase.twin.load import MOONCAKE_BLOCK_SIZE, Answer, ChatShape
from polyphase.worker.room import QueueLimits

POLICIES: dict[str, Callable[[], MakeRouting]] = {
    "round_robin": lambda: router_of("round-robin"),
    "least_loaded": lambda: router_of("least-loaded"),
    "dynamo": lambda: synchronised(SYNC_DELAY_NS),
    "kv": lambda: router_of("kv"),
}
SYNC_DELAY_NS = 5_000_000
PEERS = ("dynamo", "round_robin", "least_loaded")
BATCH_TOKENS = 8192
UNBOUNDED = 1_000_000_000  # queueing is to be seen, not refused
CHAT_BLOCK_SIZE = 64
CHAT = ChatShape(system_tokens=4096, message_tokens=2000, answer_tokens=200, turn_count=6, think_s=20.0)
BURST = ChatShape(system_tokens=8192, message_tokens=500, answer_tokens=100)


def engine_settings(block_size: int) -> MockSettings:
    return MockSettings(
        model=resolve_model("demo").location,
        shape="llama-3.1-70b",
        accelerator="4xh100",
        block_size=block_size,
        max_batch_tokens=BATCH_TOKENS,
        max_running=256,
        max_waiting=UNBOUNDED,
    )


def answers(settings: MockSettings) -> Answer:
    tokens = assemble_mock(settings, is_shared=False).tokens
    return lambda prompt, count: tokens.answer(prompt, count, settings.block_size)


def play(name: str, fleet: FleetSettings, load: Sequence[Conversation], policies: Sequence[str]) -> dict[str, Measures]:
    found: dict[str, Measures] = {}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[result]}"), console=STDERR) as progress:
        for policy in policies:
            task = progress.add_task(f"{name}, {policy}", total=None, result="")

            def show(done: int, whole: int, task: object = task) -> None:
                if done % 20 == 0 or done == whole:
                    progress.update(task, completed=done, total=whole)  # type: ignore[arg-type]

            limits = QueueLimits.of_engine(BATCH_TOKENS, UNBOUNDED, UNBOUNDED) if policy == "kv" else None
            found[policy] = result = simulate(replace(fleet, queue_limits=limits), POLICIES[policy](), load, show)
            progress.update(task, result=f"hit {result.hit_rate:.3f}, TTFT p99 {result.ttft_p99_s:.2f} s")
    show_table(name, found)
    return found


def show_table(name: str, found: dict[str, Measures]) -> None:
    table = Table("policy", "requests", "hit rate", "TTFT mean", "p50", "p99", "busy", "busiest / mean", "overload", "at worst", title=name)
    for policy, m in found.items():
        table.add_row(
            policy,
            str(m.request_count - m.refused_count),
            f"{m.hit_rate:.3f}",
            f"{m.ttft_mean_s:.3f} s",
            f"{m.ttft_p50_s:.3f} s",
            f"{m.ttft_p99_s:.3f} s",
            f"{m.busy_share:.2f}",
            f"{m.busy_spread:.2f}",
            f"{m.overload_tokens:,.0f} tokens",
            f"{m.worst_overload_tokens:,.0f} tokens",
        )
    STDERR.print(table)


def figures_of(suffix: str, found: dict[str, Measures]) -> dict[str, Figure]:
    ours, dynamo = found["kv"], found["dynamo"]
    figures = {}
    for peer in PEERS:
        theirs = found[peer]
        figures[f"ttft_p99_vs_{peer}_{suffix}"] = Figure(ours.ttft_p99_s / theirs.ttft_p99_s, "", "< 1")
        figures[f"ttft_mean_vs_{peer}_{suffix}"] = Figure(ours.ttft_mean_s / theirs.ttft_mean_s, "")
        figures[f"hit_rate_vs_{peer}_{suffix}"] = Figure(ours.hit_rate / theirs.hit_rate if theirs.hit_rate else 1.0, "", ">= 1")
    figures[f"hit_rate_{suffix}"] = Figure(ours.hit_rate, "", peer=dynamo.hit_rate)
    figures[f"ttft_mean_ms_{suffix}"] = Figure(ours.ttft_mean_s * 1e3, "ms", peer=dynamo.ttft_mean_s * 1e3)
    figures[f"ttft_p99_ms_{suffix}"] = Figure(ours.ttft_p99_s * 1e3, "ms", peer=dynamo.ttft_p99_s * 1e3)
    figures[f"busiest_over_mean_{suffix}"] = Figure(ours.busy_spread, "", peer=dynamo.busy_spread)
    figures[f"overload_tokens_{suffix}"] = Figure(ours.overload_tokens, "tokens", peer=dynamo.overload_tokens)
    return figures


def worse_of(loads: Sequence[str], figures: dict[str, Figure]) -> dict[str, Figure]:
    """The ratios to each peer, of the load on which we do worse."""
    found = {}
    for peer in PEERS:
        for name, worst, target in ((f"ttft_p99_vs_{peer}", max, "< 1"), (f"hit_rate_vs_{peer}", min, ">= 1")):
            found[name] = Figure(worst(figures[f"{name}_{load}"].value for load in loads), "", target)
    return found


def burst_figures(found: dict[str, Measures]) -> dict[str, Figure]:
    """Against routers that tell each other of their bookings as well as they can."""
    ours, sharing = found["kv"], found["dynamo"]
    return {
        "burst_worst_overload_vs_sharing": Figure(ours.worst_overload_tokens / sharing.worst_overload_tokens, "", "< 1"),
        "burst_worst_overload_tokens": Figure(ours.worst_overload_tokens, "tokens", peer=sharing.worst_overload_tokens),
        "burst_overload_vs_sharing": Figure(ours.overload_tokens / sharing.overload_tokens, "", "< 1"),
        "burst_ttft_p99_vs_sharing": Figure(ours.ttft_p99_s / sharing.ttft_p99_s, "", "< 1"),
        "burst_hit_rate_vs_sharing": Figure(ours.hit_rate / sharing.hit_rate, "", ">= 1"),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("trace", nargs="?", type=Path, help="file in Mooncake's form")
    parser.add_argument("--requests", type=int, default=1_000_000, help="of the trace, the first so many (default: all)")
    parser.add_argument("--trace-speedup", type=float, default=2.2, help="by which arrivals of the trace are hastened (default 2.2)")
    parser.add_argument("--conversations", type=int, default=300, help="chats (default 300)")
    parser.add_argument("--chat-rate", type=float, default=12.0, help="chats begun each second (default 12)")
    parser.add_argument("--bursts", type=int, default=40, help="bursts at four frontends (default 40)")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures: dict[str, Figure] = {}
    loads = []
    began_s = time.process_time()
    if options.trace is None:
        STDERR.print(
            "no TRACE was given: the figures of Mooncake's trace are left out, and the worse of the two loads is that of the chats"
        )
    else:
        fleet = FleetSettings(engine_settings(MOONCAKE_BLOCK_SIZE), options.workers)
        load = mooncake_load(options.trace, options.requests, options.trace_speedup)
        title = f"{len(load):,} requests of {options.trace.name}, {options.trace_speedup:g} times as fast"
        figures |= figures_of("mooncake", play(title, fleet, load, list(POLICIES)))
        loads.append("mooncake")
        cpu_s = time.process_time() - began_s
        figures["simulated_requests_per_cpu_s"] = Figure(len(POLICIES) * len(load) / cpu_s, "1/s", ">= 10000")
    if options.conversations:
        fleet = FleetSettings(engine_settings(CHAT_BLOCK_SIZE), options.workers)
        load = chat_load(options.conversations, options.chat_rate, answers(fleet.engine), CHAT_BLOCK_SIZE, options.seed, CHAT)
        title = f"{options.conversations} chats, {sum(len(one.turns) for one in load):,} requests"
        figures |= figures_of("chat", play(title, fleet, load, list(POLICIES)))
        loads.append("chat")
    if loads:
        figures = worse_of(loads, figures) | figures
    if options.bursts:
        fleet = FleetSettings(engine_settings(CHAT_BLOCK_SIZE), options.workers, frontend_count=4)
        load = burst_load(options.bursts, 4 * options.workers, 8.0, CHAT_BLOCK_SIZE, options.seed, BURST)
        found = play(f"{options.bursts} bursts of {4 * options.workers} requests at four frontends", fleet, load, list(POLICIES))
        figures |= burst_figures(found)
    report("routing_quality", figures, as_json=options.json)


if __name__ == "__main__":
    main()
