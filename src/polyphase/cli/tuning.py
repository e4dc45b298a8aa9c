"""`polyphase router tune`: plays a load to a simulated fleet under one router policy after the other, and shows which serves it best.

The routers are those that serve; workers are mock engines in virtual time, whose step times follow from a model and an accelerator. So
figures compare settings, and are no promise of seconds. Best: the shortest 99th percentile of the time to first token.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from polyphase.config import ENVIRONMENT_PREFIX
from polyphase.config.router import parse_weights, parts_of, weights_text
from polyphase.core.errors import ConfigurationError
from polyphase.engines.mock import MockSettings
from polyphase.engines.mock.assembly import assemble_mock
from polyphase.launch.model_source import resolve_model
from polyphase.router import PolicySettings, Router, RouterSettings, policy_of
from polyphase.twin import Conversation, FleetSettings, Measures, chat_load, mooncake_load, simulate
from polyphase.twin.fleet import MakeRouting
from polyphase.twin.load import MOONCAKE_BLOCK_SIZE, ChatShape

CHAT_BLOCK_SIZE = 64
CHAT = ChatShape(system_tokens=4096, message_tokens=2000, answer_tokens=200, turn_count=6, think_s=20.0)
UNLIMITED = 1_000_000  # queueing is to be seen, not refused
ENOUGH_HITS = 0.02  # of settings as good as the best within this part, the one with the most hits is best

DEFAULT = PolicySettings()
TRIED: Sequence[PolicySettings] = (
    DEFAULT,
    *(PolicySettings(weights={"uncached": weight}) for weight in (1.0, 2.0, 4.0)),
    *(PolicySettings(weights={"decode": weight}) for weight in (0.1, 0.5)),
    PolicySettings(weights={"uncached": 2.0, "decode": 0.1}),
    *(PolicySettings(weights={"requests": weight}) for weight in (500.0, 2000.0)),
    *(PolicySettings(temperature=temperature) for temperature in (0.1, 0.5)),
    PolicySettings("least-loaded"),
    PolicySettings("round-robin"),
)
"""The default, one change at a time, and what does not look at prefixes at all."""


@dataclass(frozen=True, slots=True)
class TuneOptions:
    trace: Path | None
    request_count: int
    speedup: float
    workers: int
    frontends: int
    model: str
    accelerator: str
    tries: Sequence[str]
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    policy: PolicySettings
    measures: Measures


def tune(options: TuneOptions, *, is_json: bool) -> None:
    """Raises: ConfigurationError."""
    policies = policies_tried(options.tries)
    fleet, load = fleet_and_load(options)
    console = Console(stderr=True, highlight=False)
    console.print(_what_is_played(options, load))
    outcomes = play(policies, fleet, load, console)
    best = best_of(outcomes)
    if is_json:
        rows = [{**_policy_json(outcome.policy), "is_best": outcome is best, **asdict(outcome.measures)} for outcome in outcomes]
        print(json.dumps({"requests": sum(len(one.turns) for one in load), "workers": options.workers, "tried": rows}, indent=2))
        return
    out = Console(highlight=False)
    out.print(table_of(outcomes, best))
    out.print(advice(best, outcomes[0]), markup=False)


def policies_tried(tries: Sequence[str]) -> list[PolicySettings]:
    """The built-in ones, or the default and those given. Raises: ConfigurationError."""
    policies = [DEFAULT, *map(parse_try, tries)] if tries else list(TRIED)
    for policy in policies:
        policy_of(policy, parts_of(policy))
    return policies


def parse_try(text: str) -> PolicySettings:
    """`uncached=2,decode=0.1`, `policy=least-loaded,temperature=0.1`: what is no policy and no temperature is a weight.

    Raises: ConfigurationError.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    special = {name.strip(): value.strip() for name, _, value in pairs if name.strip() in ("policy", "temperature")}
    try:
        weights = parse_weights(",".join(f"{name}{sign}{value}" for name, sign, value in pairs if name.strip() not in special))
        return PolicySettings(special.get("policy", DEFAULT.name), weights, float(special.get("temperature", 0.0)))
    except ValueError as error:
        raise ConfigurationError(f"--try {text}: {error}") from None


def fleet_and_load(options: TuneOptions) -> tuple[FleetSettings, list[Conversation]]:
    block_size = MOONCAKE_BLOCK_SIZE if options.trace is not None else CHAT_BLOCK_SIZE
    engine = MockSettings(
        model=resolve_model("demo").location,
        shape=options.model,
        accelerator=options.accelerator,
        block_size=block_size,
        max_batch_tokens=8192,
        max_running=256,
        max_waiting=UNLIMITED,
    )
    fleet = FleetSettings(engine, options.workers, options.frontends)
    if options.trace is not None:
        if not os.access(options.trace, os.R_OK):
            raise ConfigurationError(
                f"the trace {options.trace} cannot be read; name a file in Mooncake's form, or none for a made-up chat"
            )
        load = mooncake_load(options.trace, options.request_count, options.speedup)
        if not load:
            raise ConfigurationError(f"the trace {options.trace} holds no request")
        return fleet, load
    tokens = assemble_mock(engine, is_shared=False).tokens
    conversations = max(1, options.request_count // CHAT.turn_count)
    starts_per_s = 1.25 * options.workers * options.speedup  # near what such a fleet can take
    return fleet, chat_load(
        conversations, starts_per_s, lambda prompt, length: tokens.answer(prompt, length, block_size), block_size, options.seed, CHAT
    )


def play(policies: Sequence[PolicySettings], fleet: FleetSettings, load: Sequence[Conversation], console: Console) -> list[Outcome]:
    """One simulation after the other, each of the same requests."""
    outcomes = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        whole = len(policies) * sum(len(one.turns) for one in load)
        task = progress.add_task("requests", total=whole, now="")
        done_before = 0
        for policy in policies:
            show = _shower(progress, task, done_before)
            progress.update(task, now=describe(policy))
            measures = simulate(fleet, make_routing(policy), load, show)
            outcomes.append(Outcome(policy, measures))
            done_before += measures.request_count
            progress.update(task, completed=done_before)
    return outcomes


def make_routing(policy: PolicySettings) -> MakeRouting:
    turns, parts = count(), parts_of(policy)
    settings = RouterSettings(policy, max_waiting_requests=UNLIMITED)
    return lambda timeline: Router(replace(settings, first_turn=1000 * next(turns)), parts=parts)


def best_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Fewest refused, then the shortest p99 of TTFT; among those within `ENOUGH_HITS` of that, the highest hit rate."""
    least_refused = min(outcome.measures.refused_count for outcome in outcomes)
    serving = [outcome for outcome in outcomes if outcome.measures.refused_count == least_refused]
    shortest = min(outcome.measures.ttft_p99_s for outcome in serving)
    near = [outcome for outcome in serving if outcome.measures.ttft_p99_s <= shortest * (1 + ENOUGH_HITS)]
    return max(near, key=lambda outcome: outcome.measures.hit_rate)


def table_of(outcomes: Sequence[Outcome], best: Outcome) -> Table:
    """Times in seconds; `spread` is the busiest worker's time at work over an average one's."""
    title = "Settings tried: share of prompt tokens found cached, time to first token in seconds, busiest worker over the mean"
    table = Table(title=title, title_style="bold", title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("settings", overflow="fold")
    has_refused = any(outcome.measures.refused_count for outcome in outcomes)
    for heading in ("hits", "mean", "p50", "p99", "spread", *(["refused"] if has_refused else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        m = outcome.measures
        times_s = (m.ttft_mean_s, m.ttft_p50_s, m.ttft_p99_s)
        figures = [f"{m.hit_rate:.3f}", *(f"{time_s:.3f}" for time_s in times_s), f"{m.busy_spread:.2f}"]
        table.add_row(
            "best" if outcome is best else "",
            describe(outcome.policy),
            *figures,
            *([str(m.refused_count)] if has_refused else []),
            style="bold green" if outcome is best else "",
        )
    return table


def advice(best: Outcome, default: Outcome) -> str:
    """What to write, and what it gains."""
    if best is default:
        return "\nThe default is best for this load; nothing is to be set."
    gain = 1 - best.measures.ttft_p99_s / default.measures.ttft_p99_s if default.measures.ttft_p99_s else 0.0
    return "\n".join(
        [
            f"\nBest for this load: TTFT p99 {gain:.0%} shorter than with the default. As flags of polyphase serve:\n",
            f"  {' '.join(flags_of(best.policy))}\n",
            "or in the file of --config:\n",
            *(f"  {line}" for line in toml_of(best.policy)),
            f"\n{ENVIRONMENT_PREFIX}… variables do the same; docs/router.md says what each part is.",
        ]
    )


def flags_of(policy: PolicySettings) -> list[str]:
    flags = []
    if policy.name != DEFAULT.name:
        flags.append(f"--policy {policy.name}")
    if policy.weights:
        flags.append(f"--router-weights {weights_text(policy.weights)}")
    if policy.temperature:
        flags.append(f"--router-temperature {policy.temperature:g}")
    return flags


def toml_of(policy: PolicySettings) -> list[str]:
    """Names of parts are bare keys where TOML lets them be."""
    lines = ["[router]", f'policy = "{policy.name}"']
    if policy.temperature:
        lines.append(f"temperature = {policy.temperature:g}")
    if policy.weights:
        lines.append(f"weights = {{ {', '.join(f'{_key(name)} = {weight:g}' for name, weight in policy.weights.items())} }}")
    return lines


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def describe(policy: PolicySettings) -> str:
    changes = [weights_text(policy.weights).replace(",", ", ")] if policy.weights else []
    if policy.temperature:
        changes.append(f"temperature={policy.temperature:g}")
    return f"{policy.name}: {', '.join(changes)}" if changes else policy.name


def _policy_json(policy: PolicySettings) -> dict[str, Any]:
    return {"policy": policy.name, "weights": dict(policy.weights), "temperature": policy.temperature, "flags": " ".join(flags_of(policy))}


def _what_is_played(options: TuneOptions, load: Sequence[Conversation]) -> str:
    what = f"{len(load)} chats" if options.trace is None else options.trace.name
    requests = sum(len(one.turns) for one in load)
    pace = f", {options.speedup:g} times as fast" if options.speedup != 1 else ""
    return (
        f"Playing {what} ({requests} requests{pace}) to {options.workers} simulated workers "
        f"({options.model} on {options.accelerator}) with {options.frontends} frontend{'s' if options.frontends > 1 else ''}"
    )


def _shower(progress: Progress, task: Any, done_before: int) -> Callable[[int, int], None]:
    def show(done: int, whole: int) -> None:
        if done % 20 == 0 or done == whole:
            progress.update(task, completed=done_before + done)

    return show
