"""`polyphase explain`: what became of one request and why, from the frontend's record of it, for people who have never seen the code.

in words         which worker did what, why it and not the next best, what came of it (`retelling`)
candidates       all workers that might have had it, with the figures behind their scores
costs            what each part of the router's policy made of these figures, where there was a choice
timeline         accepted, queued, sent, first token, handed over, transferred, ended
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from polyphase.cli.retelling import Page, count_of, paragraphs, served_attempts
from polyphase.core.errors import ConfigurationError, PolyphaseError
from polyphase.launch import find_deployment

TIMEOUT_S = 5.0
MOST_COSTS = 6  # columns: more do not fit a terminal of 80 columns
MOST_REFUSALS = 3  # shown one by one
MOST_TABLES = 4  # of the latest attempts that a worker took; all are in --json
LEGEND = (
    "score: 1 is best; cached: prompt tokens that the worker held; to do: tokens to compute there, or to move there; queued: prompt tokens "
    "ahead of it; KV: blocks in use. All as the router knew it when it chose."
)
COST_LEGEND = (
    " Each cost is such a figure times the weight of its part (polyphase router parts); the lowest sum wins, and a score of 0.5 is twice "
    "that sum."
)


class ExplainFailed(PolyphaseError):
    """The frontend has no such record, or gives none."""

    code = "explain_failed"
    stage = "client"


def show_explanation(request_id: str | None, *, url: str | None, name: str | None, is_json: bool) -> None:
    """Raises: ConfigurationError if nothing runs; ExplainFailed."""
    page = fetch_any_page([url] if url else find_deployment(name, os.environ).urls, request_id)
    if is_json:
        print(json.dumps(page, indent=2, ensure_ascii=False))
        return
    Console(highlight=False).print(explanation(page))


def fetch_any_page(urls: Sequence[str], request_id: str | None) -> Page:
    """From the frontend that has it; without an id, the latest of all. Raises: ConfigurationError, ExplainFailed."""
    pages: list[Page] = []
    failures: list[PolyphaseError] = []
    for url in urls:
        try:
            pages.append(fetch_page(url, request_id))
        except (ConfigurationError, ExplainFailed) as failure:
            failures.append(failure)
    if not pages:
        raise failures[0]
    return max(pages, key=lambda page: float(page.get("created", 0)))


def fetch_page(url: str, request_id: str | None) -> Page:
    """Without an id, the page of the latest request. Raises: ConfigurationError, ExplainFailed."""
    base = url.rstrip("/").removesuffix("/v1")
    # Without proxies: one that is set in the environment knows nothing of this machine's loopback.
    with httpx.Client(base_url=base, timeout=TIMEOUT_S, trust_env=False) as client:
        try:
            if request_id is None:
                request_id = _latest_id(client)
            answer = client.get(f"/debug/requests/{quote(request_id, safe='')}")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConfigurationError(f"the frontend at {base} cannot be asked: {error}") from error
        return _checked(answer)


def _latest_id(client: httpx.Client) -> str:
    records = _checked(client.get("/debug/requests", params={"limit": 1})).get("data", [])
    if not records:
        raise ExplainFailed("the frontend has seen no request yet; send one, for example with: polyphase chat")
    return str(records[0]["answer_id"])


def _checked(answer: httpx.Response) -> Page:
    try:
        page = answer.json()
    except ValueError:
        page = None
    if answer.is_success and isinstance(page, dict):
        return page
    error = page.get("error") if isinstance(page, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    raise ExplainFailed(message or f"the frontend answered {answer.status_code} {answer.reason_phrase}")


def explanation(page: Page) -> Group:
    """All of it, for a terminal."""
    parts: list[Any] = []
    for paragraph in paragraphs(page):
        parts += [Text(paragraph), Text()]
    routes, has_costs = page["routes"], False
    for place in served_attempts(routes)[-MOST_TABLES:]:
        route = routes[place]
        title = f"Candidates of attempt {place + 1} of {len(routes)}" if len(routes) > 1 else "Candidates"
        parts += [Text(title, "bold"), candidate_table(route), Text()]
        if any(len(leg["candidates"]) > 1 and any(row.get("costs") for row in leg["candidates"]) for leg in route["legs"]):
            has_costs = True
            parts += [Text("What each would cost, in tokens of prefill", "bold"), cost_table(route), Text()]
    if routes:
        parts += [Text(LEGEND + (COST_LEGEND if has_costs else ""), "dim"), Text()]
    parts += [Text("Timeline", "bold"), timeline_table(page)]
    return Group(*parts)


# The tables


def candidate_table(route: Page) -> Table:
    """One row per candidate and leg, best first; the chosen ones are marked."""
    table = _table_of_workers()
    for heading in ("score", "cached", "to do", "queued", "KV", "requests"):
        table.add_column(heading, justify="right", no_wrap=True)
    for leg in route["legs"]:
        for row in leg["candidates"]:
            moved = row.get("tokens_to_move")
            table.add_row(
                "→" if row["is_chosen"] else "",
                row["worker"],
                {"both": "all"}.get(leg["leg"], leg["leg"]),
                f"{row['score']:.3f}",
                str(row["cached_tokens"]),
                f"{moved} moved" if moved is not None else str(row["tokens_to_compute"]),
                _known(row["queued_tokens"]),
                _known(row["used_blocks"]),
                str(row["booked_requests"]),
                style="bold" if row["is_chosen"] else "",
            )
        if hidden := leg["candidate_count"] - len(leg["candidates"]):
            table.add_row("", f"… and {hidden} more", leg["leg"], style="dim")
    return table


def cost_table(route: Page) -> Table:
    """One row per candidate and leg, a column for each part of the policy that cost any of them something; the least ones in one."""
    rows = [row for leg in route["legs"] for row in leg["candidates"]]
    names = list(dict.fromkeys(name for row in rows for name in row.get("costs") or {}))
    most = {name: max((row.get("costs") or {}).get(name, 0.0) for row in rows) for name in names}
    largest = sorted((name for name in names if most[name]), key=lambda name: -most[name])
    if len(largest) > MOST_COSTS:
        largest = largest[: MOST_COSTS - 1]
    shown = [name for name in names if name in largest]
    has_others = any(most[name] for name in names if name not in shown)
    table = _table_of_workers()
    for heading in ("sum", *shown, *(["others"] if has_others else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        costs = row.get("costs") or {}
        table.add_row(
            "→" if row["is_chosen"] else "",
            row["worker"],
            {"both": "all"}.get(row["leg"], row["leg"]),
            f"{sum(costs.values()):,.0f}",
            *(f"{costs[name]:,.0f}" if name in costs else "-" for name in shown),
            *([f"{sum(cost for name, cost in costs.items() if name not in shown):,.0f}"] if has_others else []),
            style="bold" if row["is_chosen"] else "",
        )
    return table


def _table_of_workers() -> Table:
    """Where the terminal is narrow, names of workers are folded, and figures stay whole."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("worker", overflow="fold", min_width=6)
    table.add_column("for", no_wrap=True)
    return table


def timeline_table(page: Page) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for moment in _without_repetition(page["timeline"]):
        table.add_row(f"{moment['at_ms']:.1f} ms", moment["event"], moment["worker"] or "", moment["detail"] or "")
    return table


def _without_repetition(moments: list[Page]) -> Iterator[Page]:
    """Of many refusals, the first and the last one, and how many there were in between."""
    refused = [place for place, moment in enumerate(moments) if moment["event"] == "refused"]
    first, last = (refused[0], refused[-1]) if len(refused) > MOST_REFUSALS else (len(moments), -1)
    for place, moment in enumerate(moments):
        if not first < place < last:
            yield moment
        elif place == first + 1:
            between = count_of(len(refused) - 2, "more refusal")
            yield {**moment, "event": "…", "worker": None, "detail": f"sent again, with {between} in between"}


def _known(value: int | None) -> str:
    return "-" if value is None else str(value)
