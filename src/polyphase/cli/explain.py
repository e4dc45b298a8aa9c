"""`polyphase explain`: what became of one request and why, from the frontend's record of it, for people who have never seen the code.

a paragraph      which worker did what, why it and not the next best, what came of it
candidates       all workers that might have had it, with the figures behind their scores
costs            what each part of the router's policy made of these figures
timeline         accepted, queued, sent, first token, handed over, transferred, ended
"""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from polyphase.config import format_bytes
from polyphase.core.errors import ConfigurationError, PolyphaseError
from polyphase.launch import find_deployment

TIMEOUT_S = 5.0
Page = dict[str, Any]  # of /debug/requests/{id}
LEGEND = (
    "score: 1 is best; cached: tokens of the prompt that the worker held; to do: tokens to compute, or to move where that is said; "
    "queued: prompt tokens ahead; KV: blocks in use; figures as the router knew them; each cost is such a figure times the weight of its "
    "part (polyphase router parts), and the score is the lowest sum over the worker's own"
)


class ExplainFailed(PolyphaseError):
    """The frontend has no such record, or gives none."""

    code = "explain_failed"
    stage = "client"


def show_explanation(request_id: str | None, *, url: str | None, name: str | None, is_json: bool) -> None:
    """Raises: ConfigurationError if nothing runs; ExplainFailed."""
    page = fetch_page(url or find_deployment(name, os.environ).url, request_id)
    if is_json:
        print(json.dumps(page, indent=2, ensure_ascii=False))
        return
    Console(highlight=False).print(explanation(page))


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
    parts: list[Any] = [Text(in_words(page)), Text()]
    routes = page["routes"]
    for number, route in enumerate(routes, start=1):
        title = f"Candidates of attempt {number} of {len(routes)}" if len(routes) > 1 else "Candidates"
        parts += [Text(title, "bold"), candidate_table(route)]
        if any(row.get("costs") for leg in route["legs"] for row in leg["candidates"]):
            parts += [Text(), Text("What each would cost, in tokens of prefill", "bold"), cost_table(route)]
    if routes:
        parts += [Text(LEGEND, "dim"), Text()]
    parts += [Text("Timeline", "bold"), timeline_table(page)]
    return Group(*parts)


# The paragraph


def in_words(page: Page) -> str:
    """A few sentences: what was asked, where it went, why there, what it cost, how it ended."""
    sentences = [_what_was_asked(page), *_how_long_it_waited(page)]
    for number, route in enumerate(page["routes"]):
        if number:
            sentences.append(f"That was broken off ({_trimmed(route['cause'])}), so another worker went on with {route['tokens']} tokens.")
        sentences += _where_and_why(route)
    if not page["routes"]:
        why = _trimmed(page["error"]) if page["error"] else "no worker had room for it yet"
        sentences.append(f"It was given to no worker: {why}.")
    sentences += _what_it_cost(page)
    sentences.append(_how_it_ended(page))
    return " ".join(sentences)


def _what_was_asked(page: Page) -> str:
    choices = f", {page['choices']} sequences of which the first is told of here" if page["choices"] > 1 else ""
    return f"Request {page['id']} asked the model {page['model']} to go on from {_count(page['prompt_tokens'], 'prompt token')}{choices}."


def _how_long_it_waited(page: Page) -> list[str]:
    """In the frontend's queue, if it did."""
    queued = next((moment for moment in page["timeline"] if moment["event"] == "queued"), None)
    if queued is None:
        return []
    why = _trimmed(queued["detail"])
    wait_ms = page["admission_wait_ms"]
    if wait_ms is None:
        return [f"It waits in the frontend's queue ({why})."]
    then = "until a worker had room" if page["routes"] else "in vain"
    return [f"It waited {wait_ms / 1e3:.2f} s in the frontend's queue {then} ({why})."]


def _where_and_why(route: Page) -> list[str]:
    legs = route["legs"]
    phrase = route["reason"].split(": ", 1)[-1]
    if route["split"]:
        prefill, decode = legs[0]["worker"], legs[1]["worker"]
        head = f"It was split: {prefill} was to compute the prompt and {decode} to generate the answer ({phrase})."
    else:
        head = f"It went to {legs[0]['worker']} as a whole ({phrase})."
    return [head, *(_why_this_worker(leg, is_split=route["split"]) for leg in legs)]


def _why_this_worker(leg: Page, *, is_split: bool) -> str:
    rows, worker = leg["candidates"], leg["worker"]
    role = f" to {'compute the prompt' if leg['leg'] == 'prefill' else 'generate'}" if is_split else ""
    chosen = next((row for row in rows if row["is_chosen"]), None)
    if chosen is None:
        return f"{worker} was chosen{role} among {leg['candidate_count']} workers."
    if len(rows) == 1:
        return f"{worker} was the only one that could be chosen{role}: it {_facts(chosen)}."
    best = next(row for row in rows if row is not chosen)
    if best["score"] > chosen["score"]:
        score = f"with a score of {chosen['score']:.3f} where the best, {best['worker']}, had {best['score']:.3f}"
        return f"{worker} was drawn by chance{role}, {score}: it {_facts(chosen)}."
    if best["score"] == chosen["score"]:
        return f"{worker} was chosen{role}: it {_facts(chosen)}; {best['worker']} was just as good, and equals take turns."
    others = leg["candidate_count"] - 2
    rest = f"; {_count(others, 'other')} had no better score than that" if others else ""
    next_best = f"the next best, {best['worker']}, {_facts(best)}{_difference(chosen, best)}"
    return f"{worker} was chosen{role} because it {_facts(chosen)}; {next_best}{rest}."


def _difference(chosen: Page, other: Page) -> str:
    """Which part of the policy spoke most against the other one, in sums of costs."""
    ours, theirs = chosen.get("costs") or {}, other.get("costs") or {}
    if not theirs:
        return ""
    part = max(theirs, key=lambda name: theirs[name] - ours.get(name, 0.0))
    return f" (cost {sum(ours.values()):.0f} against {sum(theirs.values()):.0f} tokens of prefill, most of the difference by {part})"


def _facts(row: Page) -> str:
    """The figures behind a score: `held 32 prompt tokens in its cache and had to compute 480, with nothing queued before it …`."""
    verb = "had" if row["is_chosen"] else "would have had"
    held = f"held {_count(row['cached_tokens'], 'prompt token')} in its cache" if row["cached_tokens"] else "held nothing of the prompt"
    if row.get("lower_tier_tokens"):
        held += f" and {row['lower_tier_tokens']} below it"
    move = row.get("tokens_to_move")
    work = f"{verb} to compute {row['tokens_to_compute']}" if move is None else f"{verb} to be sent {move}"
    queued = row["queued_tokens"] if row["queued_tokens"] is not None else row["booked_prefill_tokens"]
    ahead = f"after {queued} that were queued before" if queued else "with nothing queued before it"
    used = row["used_blocks"] if row["used_blocks"] is not None else row["booked_blocks"]
    return f"{held} and {work}, {ahead} and {_count(used, 'KV block')} in use"


def _what_it_cost(page: Page) -> list[str]:
    sentences = []
    leg = page["routes"][-1]["legs"][0] if page["routes"] else None
    if leg is not None and leg["reported_cached_tokens"] is not None:
        predicted, reported = leg["predicted_cached_tokens"], leg["reported_cached_tokens"]
        if predicted == reported:
            sentences.append(f"The router had expected {predicted} cached tokens there, and that is what the engine found.")
        else:
            sentences.append(f"The router had expected {predicted} cached tokens there; the engine found {reported}.")
    if page["transferred_tokens"]:
        moved = f"{page['transferred_tokens']} tokens ({format_bytes(page['kv_bytes_moved'])})"
        sentences.append(f"The KV cache of {moved} was moved in {page['transfer_ms']:.1f} ms.")
    if page["ttft_ms"] is not None:
        pace = f", and the others followed every {page['itl_ms_mean']:.1f} ms" if page["itl_ms_mean"] is not None else ""
        sentences.append(f"The first token came after {page['ttft_ms']:.1f} ms{pace}.")
    return sentences


def _how_it_ended(page: Page) -> str:
    count = _count(page["completion_tokens"], "token")
    match page["status"]:
        case "running":
            return f"It is still running, with {count} so far."
        case "finished":
            why = {"stop": "the model or a stop string ended it", "length": "it was as long as it might be"}
            return f"It ended after {count}: {why.get(page['finish_reason'], page['finish_reason'])}."
        case "cancelled":
            return f"Its client went away after {count}."
        case _:
            return f"It failed after {count}: {_trimmed(page['error'])}."


# The tables


def candidate_table(route: Page) -> Table:
    """One row per candidate and leg, best first; the chosen ones are marked."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("", "worker", "for"):
        table.add_column(heading, no_wrap=True)
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
    """One row per candidate and leg, a column for each part of the policy that cost any of them something."""
    rows = [row for leg in route["legs"] for row in leg["candidates"]]
    names = list(dict.fromkeys(name for row in rows for name in row.get("costs") or {}))
    shown = [name for name in names if any((row.get("costs") or {}).get(name) for row in rows)]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("", "worker", "for"):
        table.add_column(heading, no_wrap=True)
    for heading in ("sum", *shown):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        costs = row.get("costs") or {}
        table.add_row(
            "→" if row["is_chosen"] else "",
            row["worker"],
            {"both": "all"}.get(row["leg"], row["leg"]),
            f"{sum(costs.values()):,.0f}",
            *(f"{costs[name]:,.0f}" if name in costs else "-" for name in shown),
            style="bold" if row["is_chosen"] else "",
        )
    return table


def timeline_table(page: Page) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for moment in page["timeline"]:
        table.add_row(f"{moment['at_ms']:.1f} ms", moment["event"], moment["worker"] or "", moment["detail"] or "")
    return table


def _known(value: int | None) -> str:
    return "-" if value is None else str(value)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _trimmed(text: str | None) -> str:
    return (text or "no reason was kept").rstrip(".")
