"""What clients say about sessions and labels reaches the router, whatever way they say it."""

from __future__ import annotations

from typing import Any

import pytest

from polyphase.core.errors import InvalidRequest
from polyphase.frontend.hints import RoutingHints
from polyphase.frontend.openai_types import CompletionRequest

from .stack import Stack, wait_for


def hints(headers: dict[str, str] | None = None, **fields: Any) -> RoutingHints:
    scope = {"headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()]}
    return RoutingHints.of(scope, CompletionRequest(model="m", prompt="x", **fields))


def test_the_session_is_what_stands_nearest():
    by_header = hints({"x-polyphase-session": "a"}, prompt_cache_key="b", user="c").session
    assert by_header == hints({"x-polyphase-session": "a"}).session == hints(prompt_cache_key="a").session == hints(user="a").session
    assert hints(prompt_cache_key="b", user="c").session == hints(user="b").session != by_header
    assert hints().session is hints(safety_identifier="a").session is hints(user="", prompt_cache_key="").session is None


def test_two_tenants_with_the_same_name_for_a_session_have_two():
    assert len({hints(user="a").session, hints(user="a", cache_salt="x").session, hints(user="a", cache_salt="y").session}) == 3


def test_any_name_of_a_session_is_taken():
    assert hints(user="\ud800 🙂" * 10_000).session is not None


def test_labels():
    given = hints({"x-polyphase-prefer": "zone=eu-1, rack = 7", "x-polyphase-require": "nvlink-domain=a/b"})
    assert (given.preferred_labels, given.required_labels) == ({"zone": "eu-1", "rack": "7"}, {"nvlink-domain": "a/b"})


@pytest.mark.parametrize("text", ["", "zone", "zone=", "=x", "zone=a,zone=b", "zone=ä", ",".join(f"l{n}=x" for n in range(17)), "a=b;c=d"])
def test_labels_in_another_form_are_refused(text: str):
    with pytest.raises(InvalidRequest, match="for example zone=eu-1"):
        hints({"x-polyphase-require": text})


async def ask(stack: Stack, headers: dict[str, str] | None = None, **fields: Any) -> str:
    """Where a short request went; it has no full block, so nothing of it is cached anywhere."""
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 1, **fields}
    answer = await stack.post("/v1/completions", body, headers=headers or {})
    assert answer.status_code == 200, answer.text
    await wait_for(lambda: stack.is_at_rest)
    return answer.headers["x-polyphase-decode-worker"]


async def test_requests_of_a_session_go_where_it_was(stack: Stack) -> None:
    for name in "abc":
        await stack.add(name)
    assert len({await ask(stack, {"x-polyphase-session": "s"}) for _ in range(4)}) == 1
    assert len({await ask(stack, prompt_cache_key="t") for _ in range(4)}) == 1
    assert len({await ask(stack) for _ in range(3)}) == 3


async def test_the_cost_of_leaving_a_session_shows_in_the_record(stack: Stack) -> None:
    for name in "ab":
        await stack.add(name)
    home = await ask(stack, user="u")
    assert await ask(stack, user="u") == home
    page = (await stack.get("/debug/requests?limit=1")).json()["data"][0]
    costs = {row["worker"]: row["costs"]["session"] for row in page["candidates"]}
    assert costs == {home: 0.0, "b" if home == "a" else "a": 512.0}


async def test_a_required_label_that_nobody_carries_is_a_clear_503(stack: Stack) -> None:
    await stack.add("a")
    body = {"model": "tiny", "prompt": [1], "max_tokens": 1}
    answer = await stack.post("/v1/completions", body, headers={"x-polyphase-require": "zone=mars"})
    assert answer.status_code == 503
    assert "lacks a required label; wanted: zone=mars" in answer.json()["error"]["message"]
    answer = await stack.post("/v1/completions", body, headers={"x-polyphase-require": "zone"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-polyphase-require")


async def test_labels_draw_and_bind(stack: Stack) -> None:
    await stack.add("a", labels={"zone": "x"})
    await stack.add("b", labels={"zone": "y"})
    for header in ("x-polyphase-prefer", "x-polyphase-require"):
        assert {await ask(stack, {header: "zone=y"}) for _ in range(3)} == {"b"}
        assert {await ask(stack, {header: "zone=x"}) for _ in range(3)} == {"a"}
