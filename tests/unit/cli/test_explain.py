"""`polyphase explain` says in words what a record holds."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from polyphase.cli.explain import explanation
from polyphase.cli.retelling import paragraphs
from tests.unit.cli.conftest import CommandLine


def candidate(worker: str, leg: str, score: float, *, cached: int, missing: int, chosen: bool = False, queued: int = 0) -> dict[str, Any]:
    return {
        "leg": leg, "worker": worker, "is_chosen": chosen, "score": score, "overlap_blocks": cached // 16, "cached_tokens": cached,
        "tokens_to_move" if leg == "decode" else "tokens_to_compute": missing, "queued_tokens": queued, "used_blocks": 1,
        "booked_prefill_tokens": queued, "booked_blocks": 1, "booked_requests": 0,
    }  # fmt: skip


def leg(name: str, *candidates: dict[str, Any], reported: int | None = 0) -> dict[str, Any]:
    chosen = next(row for row in candidates if row["is_chosen"])
    return {
        "leg": name, "worker": chosen["worker"], "predicted_cached_tokens": chosen["cached_tokens"], "reported_cached_tokens": reported,
        "transferred_tokens": 0, "queue_ms": 1.0, "transfer_ms": 0.0, "candidate_count": len(candidates), "candidates": list(candidates),
    }  # fmt: skip


SPLIT = {
    "at_ms": 0.2, "reason": "split: 480 of 512 prompt tokens to compute away from decoding requests", "rule": "split", "split": True,
    "tokens": 512, "block_size": 16, "setback": None,
    "legs": [
        leg(
            "prefill",
            candidate("prefill-1", "prefill", 1.0, cached=32, missing=480, chosen=True),
            candidate("prefill-0", "prefill", 0.4, cached=0, missing=512, queued=900),
            reported=32,
        ),
        leg("decode", candidate("decode-1", "decode", 1.0, cached=0, missing=512, chosen=True)),
    ],
}  # fmt: skip
LOST = {"event": "broken off", "worker": "decode-1", "cause": "worker decode-1 was lost while it served the request"}
PAGE: dict[str, Any] = {
    "id": "req-1", "answer_id": "chatcmpl-1", "model": "demo", "status": "finished", "prompt_tokens": 512, "transferred_tokens": 512,
    "kv_bytes_moved": 2 * 1024**2, "transfer_ms": 1.25, "admission_wait_ms": 0.0, "completion_tokens": 9, "refusals": 0,
    "ttft_ms": 13.44, "itl_ms_mean": 3.1,
    "finish_reason": "stop", "error": None, "choices": 1, "routes": [SPLIT],
    "timeline": [
        {"at_ms": 0.0, "event": "accepted", "worker": None, "detail": None},
        {"at_ms": 13.4, "event": "first token", "worker": "prefill-1", "detail": None},
    ],
}  # fmt: skip


NOWHERE: dict[str, Any] = {"routes": [], "ttft_ms": None, "completion_tokens": 0}


def in_words(page: dict[str, Any]) -> str:
    return " ".join(paragraphs(page))


def page(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(PAGE), **changes}


def test_a_split_request_in_words():
    assert in_words(PAGE) == (
        "Request req-1 asked the model demo to go on from 512 prompt tokens. "
        "It went to two workers: prefill-1 to compute the prompt, decode-1 to generate the answer. "
        "Why two: 480 of 512 prompt tokens to compute away from decoding requests. "
        "prefill-1 was chosen to compute the prompt because it held 32 prompt tokens in its cache and had to compute 480, "
        "with nothing queued before it and 1 KV block in use; the next best, prefill-0, held nothing of the prompt and would have had "
        "to compute 512, after 900 that were queued before and 1 KV block in use. "
        "decode-1 was the only one that could be chosen to generate: it held nothing of the prompt and had to be sent 512, "
        "with nothing queued before it and 1 KV block in use. "
        "The router had expected 32 cached tokens there, and that is what the engine found. "
        "The KV cache of 512 tokens (2.0 MiB) was moved in 1.2 ms. "
        "The first token came after 13.4 ms, and the others followed every 3.1 ms. "
        "It ended after 9 tokens: the model or a stop string ended it."
    )


def with_costs(row: dict[str, Any], **costs: float) -> dict[str, Any]:
    return {**row, "costs": costs}


def test_costs_say_which_part_made_the_difference():
    legs = [
        leg(
            "both",
            with_costs(candidate("a", "both", 1.0, cached=32, missing=480, chosen=True), uncached=1440, queued=0, decode=10),
            with_costs(candidate("b", "both", 0.5, cached=0, missing=512, queued=900), uncached=1536, queued=900, decode=0),
        )
    ]
    shown = page(routes=[{**SPLIT, "split": False, "reason": "whole: short", "legs": legs}])
    assert "(a cost of 2,436 against 1,450, most of the difference by 'queued')" in in_words(shown)
    console = Console(width=200, file=StringIO())
    console.print(explanation(shown))
    printed = console.file.getvalue()
    assert "What each would cost, in tokens of prefill" in printed
    assert [line.split() for line in printed.splitlines() if line.startswith("→")][1] == ["→", "a", "all", "1,450", "1,440", "0", "10"]


def test_a_choice_by_chance_is_called_that():
    drawn = leg(
        "both",
        candidate("b", "both", 1.0, cached=16, missing=9),
        candidate("a", "both", 0.5, cached=0, missing=25, chosen=True),
        reported=0,
    )
    text = in_words(page(routes=[{**SPLIT, "split": False, "reason": "whole: short", "legs": [drawn]}]))
    assert "a was drawn by chance, with a score of 0.500 where the best, b, had 1.000" in text


def test_a_migration_says_why():
    whole = {
        **SPLIT, "split": False, "tokens": 516, "reason": "whole: short",
        "legs": [leg("both", candidate("decode-0", "both", 1.0, cached=0, missing=516, chosen=True), reported=None)],
    }  # fmt: skip
    text = in_words(page(routes=[{**SPLIT, "setback": LOST}, whole]))
    assert (
        "broken off (worker decode-1 was lost while it served the request); what was generated by then was kept. Then it went to decode-0"
        in text
    )


def refused_by(worker: str) -> dict[str, Any]:
    setback = {"event": "refused", "worker": worker, "cause": "9 requests wait for this worker already, which is its limit"}
    return {**SPLIT, "setback": setback}


def test_refusals_are_told_together():
    """However many there were: who was asked, how often, and the last reason; tables only of what was served."""
    shown = page(routes=[refused_by("b"), refused_by("a"), refused_by("b"), SPLIT], refusals=50)
    text = in_words(shown)
    assert (
        "It was offered to a and b (2 times), and refused, 50 times in all, in the end by b: 9 requests wait for this worker already, "
        "which is its limit. Then it went to two workers"
    ) in text
    shown["timeline"] = [
        {"at_ms": 1.0 * place, "event": event, "worker": "b", "detail": None} for place in range(9) for event in ("sent", "refused")
    ]
    printed = as_printed(shown, width=80)
    assert "Candidates of attempt 4 of 4" in printed
    assert printed.count("Candidates") == 1
    assert "sent again, with 7 more refusals in between" in printed
    assert printed.count("refused\n") + printed.count("refused  b") == 2
    assert "It was offered to b, and refused: 9 requests" in in_words(page(routes=[refused_by("b")], refusals=1))


@pytest.mark.parametrize("width", [60, 80])
def test_tables_fit_narrow_terminals(width: int):
    """With long names and every part of a policy in use, no figure is cut off at 80 columns; names give way."""
    names = ("uncached", "host", "moved", "distance", "queued", "decode", "overflow", "requests", "session", "labels")
    costs = dict.fromkeys(names if width == 80 else names[:3], 12_345.0)
    rows = [
        with_costs(candidate(f"prefill-worker-of-rack-{n}", "prefill", 1.0, cached=9, missing=99999, chosen=not n), **costs)
        for n in range(2)
    ]
    printed = as_printed(page(routes=[{**SPLIT, "split": False, "legs": [leg("prefill", *rows)]}]), width=width)
    assert max(map(len, printed.splitlines())) <= width
    assert printed.count("12,345") == 2 * min(len(costs), 5 if width == 80 else 3)
    assert ("  others" in printed) == (width == 80)
    assert printed.count("99999") >= 2


def as_printed(shown: dict[str, Any], width: int) -> str:
    console = Console(width=width, file=StringIO())
    console.print(explanation(shown))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_equals_take_turns():
    equal = leg(
        "both", candidate("a", "both", 0.5, cached=0, missing=9, chosen=True), candidate("b", "both", 0.5, cached=0, missing=9), reported=16
    )
    text = in_words(page(routes=[{**SPLIT, "split": False, "reason": "whole: short", "legs": [equal]}]))
    assert "b was just as good, and equals take turns" in text
    assert "expected 0 cached tokens there; the engine found 16" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "running"}, "It is still running, with 9 tokens so far."),
        ({"status": "cancelled", "finish_reason": "cancelled"}, "Its client went away after 9 tokens."),
        ({"status": "failed", "error": "worker_lost: it died"}, "It failed after 9 tokens: worker_lost: it died."),
        ({"finish_reason": "length", "completion_tokens": 1}, "It ended after 1 token, the most that it was allowed."),
        (NOWHERE | {"status": "failed", "error": "overloaded: full"}, "prompt tokens. It was given to no worker: overloaded: full."),
        (NOWHERE | {"status": "running"}, "prompt tokens. No worker had room for it yet."),
        (NOWHERE | {"status": "cancelled"}, "prompt tokens. Its client went away before a worker had room for it."),
    ],
)
def test_how_it_ended(changes: dict[str, Any], words: str):
    text = in_words(page(**changes))
    assert words in text
    assert changes.get("routes") != [] or text.endswith(words), "it is told once"


class Frontend(ThreadingHTTPServer):
    pages: tuple[dict[str, Any], ...] = (PAGE,)


class Handler(BaseHTTPRequestHandler):
    server: Frontend

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        found = [record for record in self.server.pages if path in (f"/debug/requests/{record[key]}" for key in ("id", "answer_id"))]
        if path == "/debug/requests":
            self.answer(200, {"data": list(self.server.pages)})
        elif found:
            self.answer(200, found[0])
        else:
            self.answer(404, {"error": {"message": "there is no record of it"}})

    def answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def frontend() -> Iterator[Frontend]:
    with Frontend(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_the_command_prints_words_candidates_and_timeline(polyphase: CommandLine, frontend: Frontend):
    url = f"http://127.0.0.1:{frontend.server_address[1]}"
    latest = polyphase("explain", "--url", f"{url}/v1")
    assert latest.exit_code == 0, latest.output
    lines = [line.split() for line in latest.output.splitlines()]
    assert ["→", "prefill-1", "prefill", "1.000", "32", "480", "0", "1", "0"] in lines
    assert ["prefill-0", "prefill", "0.400", "0", "512", "900", "1", "0"] in lines
    assert ["→", "decode-1", "decode", "1.000", "0", "512", "moved", "0", "1", "0"] in lines
    assert ["13.4", "ms", "first", "token", "prefill-1"] in lines
    assert polyphase("explain", "req-1", "--url", url).output == latest.output
    assert json.loads(polyphase("explain", "req-1", "--url", url, "--json").output) == PAGE


def test_what_cannot_be_explained(polyphase: CommandLine, frontend: Frontend):
    url = f"http://127.0.0.1:{frontend.server_address[1]}"
    unknown = polyphase("explain", "req-9", "--url", url)
    assert unknown.exit_code == 1
    assert "there is no record of it" in unknown.output
    frontend.pages = ()
    assert "no request yet" in polyphase("explain", "--url", url).output
    nowhere = polyphase("explain", "--url", "http://127.0.0.1:1")
    assert nowhere.exit_code == 1
    assert "cannot be asked" in nowhere.output
    assert "no deployment is running" in polyphase("explain").output


QUEUED = {"at_ms": 0.1, "event": "queued", "worker": None, "detail": "every worker is busy, 3 wait already; expected to wait 0.4 s"}


def test_a_wait_in_the_queue_is_told() -> None:
    timeline = [PAGE["timeline"][0], QUEUED]
    waited = in_words(page(timeline=timeline, admission_wait_ms=812.4))
    why = "(every worker is busy, 3 wait already; expected to wait 0.4 s)"
    assert f"It waited 0.81 s in the frontend's queue until a worker had room {why}." in waited
    waits = in_words(page(timeline=timeline, admission_wait_ms=None, routes=[], status="running", ttft_ms=None))
    assert f"It waits in the frontend's queue {why}." in waits
    evicted = in_words(
        page(timeline=timeline, admission_wait_ms=100.0, routes=[], status="failed", error="evicted: too late", ttft_ms=None)
    )
    assert f"It waited 0.10 s in the frontend's queue in vain {why}." in evicted
    assert "frontend's queue" not in in_words(page())


def test_where_kv_came_from_is_told() -> None:
    page = copy.deepcopy(PAGE)
    route = page["routes"][0]
    reason = "decode-0 is said to hold 320 prompt tokens that prefill-1 does not; pulling them should take 5 ms, computing them 90 ms"
    route["pull"] = {"holder": "decode-0", "tokens": 320, "is_wanted": True, "reason": reason}
    route["legs"][0]["transferred_tokens"] = 304
    assert f"KV elsewhere: {reason}. It got 304 of 320." in " ".join(paragraphs(page))
    route["pull"]["is_wanted"] = False
    assert f"KV elsewhere: {reason}." in " ".join(paragraphs(page))
    assert "It got" not in " ".join(paragraphs(page))
    route["pull"] = None
    assert "KV elsewhere" not in " ".join(paragraphs(page))
