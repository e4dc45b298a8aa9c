"""`polyphase router tune` in small: what it plays, what it calls best, and what it tells to write."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from polyphase.cli.tuning import TRIED, Outcome, advice, best_of, flags_of, parse_try, policies_tried, toml_of
from polyphase.config import load_serve_settings
from polyphase.core.errors import ConfigurationError
from polyphase.router import PolicySettings
from polyphase.twin import Measures
from tests.unit.cli.conftest import CommandLine

MEASURES = Measures(
    request_count=10,
    refused_count=0,
    hit_rate=0.5,
    ttft_mean_s=1.0,
    ttft_p50_s=1.0,
    ttft_p99_s=2.0,
    busy_spread=1.0,
    overload_tokens=0.0,
    worst_overload_tokens=0.0,
    busy_share=0.5,
)
SMALL = ("router", "tune", "--requests", "24", "--workers", "2")


def outcome(policy: PolicySettings, **figures: float) -> Outcome:
    return Outcome(policy, replace(MEASURES, **figures))


def test_a_made_up_chat_is_played_under_each_setting(polyphase: CommandLine):
    result = polyphase(*SMALL, "--try", "uncached=1", "--try", "policy=round-robin", "--json")
    assert result.exit_code == 0, result.output
    page = json.loads(result.stdout)
    assert [(one["policy"], one["weights"]) for one in page["tried"]] == [("kv", {}), ("kv", {"uncached": 1.0}), ("round-robin", {})]
    assert sum(one["is_best"] for one in page["tried"]) == 1
    assert all(one["request_count"] == page["requests"] and one["refused_count"] == 0 for one in page["tried"])
    assert page["tried"][0]["hit_rate"] >= page["tried"][2]["hit_rate"]


def test_a_trace_is_played_and_the_best_marked(polyphase: CommandLine, tmp_path: Path):
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 100 * n, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1 + n % 3, 10 + n]} for n in range(30)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = polyphase("router", "tune", str(trace), "--workers", "2", "--try", "policy=least-loaded")
    assert result.exit_code == 0, result.output
    assert "30 requests" in result.stderr
    assert sum(line.startswith("best") for line in result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "the trace none.jsonl cannot be read"),
        (["--try", "uncached"], "--try uncached: 'uncached' are no weights"),
        (["--try", "uncachd=1"], "no router scorer 'uncachd'; did you mean uncached"),
        (["--try", "policy=kw"], "no router policy 'kw'; did you mean kv"),
        (["--try", "temperature=x"], "--try temperature=x: could not convert"),
        (["--model", "gpt-9000"], "gpt-9000"),
    ],
)
def test_what_is_wrong_is_told(polyphase: CommandLine, arguments: list[str], message: str):
    result = polyphase(*SMALL, *arguments)
    assert result.exit_code == 1
    assert message in result.output


def test_an_empty_trace(polyphase: CommandLine, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no request" in polyphase(*SMALL, str(tmp_path / "empty.jsonl")).output


def test_the_best_refuses_least_then_answers_first_and_among_equals_hits_most():
    a, b = PolicySettings(), PolicySettings("least-loaded")
    assert best_of([outcome(a, ttft_p99_s=2.0), outcome(b, ttft_p99_s=1.0)]).policy == b
    assert best_of([outcome(a, ttft_p99_s=2.0), outcome(b, ttft_p99_s=1.0, refused_count=1)]).policy == a
    assert best_of([outcome(a, ttft_p99_s=2.0, hit_rate=0.4), outcome(b, ttft_p99_s=2.01, hit_rate=0.6)]).policy == b


@pytest.mark.parametrize("policy", [*TRIED[1:], PolicySettings(weights={"uncached": 2.0, "requests": 0.5}, temperature=0.1)])
def test_what_it_says_to_write_is_that_policy(policy: PolicySettings, tmp_path: Path):
    words = [word for flag in flags_of(policy) for word in flag.split()]
    flags = {flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    assert load_serve_settings({"model": "demo", **flags}, {}).router_policy == policy
    file = tmp_path / "serve.toml"
    file.write_text("\n".join(toml_of(policy)))
    assert tomllib.loads(file.read_text())
    assert load_serve_settings({"model": "demo"}, {}, file).router_policy == policy


def test_advice():
    default, better = outcome(PolicySettings()), outcome(PolicySettings(weights={"uncached": 2.0}), ttft_p99_s=1.5)
    assert "nothing is to be set" in advice(default, default)
    told = advice(better, default)
    assert "TTFT p99 25% shorter" in told
    assert "--router-weights uncached=2" in told
    assert "[router]" in told


def test_tries():
    assert parse_try("policy=least-loaded, uncached=1 ,temperature=0.5") == PolicySettings("least-loaded", {"uncached": 1.0}, 0.5)
    assert policies_tried(["queued=2"]) == [PolicySettings(), PolicySettings(weights={"queued": 2.0})]
    with pytest.raises(ConfigurationError):
        policies_tried(["temperature=-1"])
