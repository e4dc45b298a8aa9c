"""vLLM's two legs as recorded from two real servers: the offer of the one is what the other takes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from polyphase.core.errors import ModelLoadError
from polyphase.engines.interface import Ability, abilities_of
from polyphase.engines.served.engine import ServedEngine
from polyphase.engines.vllm import VllmSettings
from polyphase.engines.vllm.assembly import load_vllm_engines
from polyphase.engines.vllm.dialects import dialect_of
from polyphase.engines.vllm.flags import environment, rank_count, serve_command, unusable_flags
from polyphase.engines.vllm.hand_over import NixlPrefill, kind_of
from polyphase.engines.vllm.metrics import gauges_of
from polyphase.testing.engines import stepping
from polyphase.text import Tokenizer
from polyphase.wire.kv import EngineOffer
from polyphase.wire.requests import FinishReason, StopConditions
from tests.unit.vllm.double import Recording, VllmDouble, serving
from tests.unit.vllm.test_engine import RECORDING, TOKENIZER, card_of_recording, request
from tests.unit.vllm.test_flags import DEMO, settings, value_of

PROMPT = list(range(300, 400))
FACTS = {"vLLM's version": "0.32.0", "dtype": "bfloat16"}


def engine_of(url: str, *, has_generate: bool = True) -> ServedEngine:
    card = msgspec.structs.replace(card_of_recording(), can_hand_over=True, offer_kind=kind_of(FACTS), offer_facts=FACTS)
    dialect = dialect_of("tiny", has_generate=has_generate, takes_priority=True)
    engine = ServedEngine(card, Tokenizer.from_json(TOKENIZER.encode()), url, dialect, prefill=NixlPrefill(dialect))
    engine.bind_offers(worker_id="p", epoch=1, endpoint="ipc://p")
    return engine


@pytest.fixture(params=[True, False], ids=["generate", "completions"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[ServedEngine]:
    async with serving(VllmDouble(RECORDING, has_generate=request.param)) as double:
        yield engine_of(double.url, has_generate=request.param)
        assert not double.unrecorded


async def test_the_decode_leg_takes_what_the_prefill_leg_offers(engine: ServedEngine) -> None:
    async with stepping(engine) as run:
        engine.submit(request("prefill", PROMPT, hand_over=True))
        end = await run.end("prefill")
        assert (end.finish_reason, run.tokens("prefill")) == (FinishReason.HANDED_OVER, []), "the other one makes the first token"
        assert isinstance(end.offer, EngineOffer)
        assert end.offer.params["do_remote_prefill"] is True
        assert end.offer.params["remote_host"] == "127.0.0.1"
        engine.submit(request("decode", PROMPT, offer=end.offer))
        end = await run.end("decode")
        assert (end.finish_reason, len(run.tokens("decode"))) == (FinishReason.LENGTH, 6)


def test_nothing_ends_a_prompt_leg_but_its_length() -> None:
    """Else older versions free the blocks of a prompt whose next token is the end, and offer nothing."""
    asked = request("a", PROMPT, hand_over=True, stop=StopConditions(max_tokens=9, stop_token_ids=[7]))
    for has_generate in (True, False):
        dialect = dialect_of("tiny", has_generate=has_generate, takes_priority=True)
        body: dict[str, Any] = json.loads(NixlPrefill(dialect).prefill_body(asked, None))
        sampling = body.get("sampling_params", body)
        assert (sampling["max_tokens"], sampling["ignore_eos"], sampling["stop_token_ids"], body["stream"]) == (1, True, [], False)


async def attached(double: VllmDouble, tmp_path: Path) -> list[ServedEngine]:
    given = VllmSettings(model=DEMO, name="tiny", folder=tmp_path / "w", attach=double.url)
    return await asyncio.to_thread(load_vllm_engines, given)


async def test_what_a_server_can_is_asked_of_it(tmp_path: Path) -> None:
    async with serving(VllmDouble(RECORDING)) as double:
        (engine,) = await attached(double, tmp_path)
    card = engine.card
    assert {Ability.HAND_OVER, Ability.SLEEP, Ability.KV_EVENTS} <= set(abilities_of(engine))
    assert card.offer_kind == kind_of(card.offer_facts)
    assert {"vLLM's version": "0.32.0", "block size": "32"}.items() <= card.offer_facts.items()


async def test_without_a_connector_nothing_is_handed_over(tmp_path: Path) -> None:
    recording = Recording()
    for exchange in recording.exchanges.values():
        if "hand-over" in exchange["name"]:
            exchange["answer"] = json.dumps({**json.loads(exchange["answer"]), "kv_transfer_params": None})
    async with serving(VllmDouble(recording)) as double:
        (engine,) = await attached(double, tmp_path)
    assert (engine.card.can_hand_over, engine.card.offer_kind) == (False, "")
    assert Ability.HAND_OVER not in abilities_of(engine)


async def test_a_sleeping_server_is_not_waited_for(tmp_path: Path) -> None:
    recording = Recording()
    recording.pages["/is_sleeping"] = {"is_sleeping": True}
    async with serving(VllmDouble(recording)) as double:
        with pytest.raises(ModelLoadError, match="is asleep, and hangs its callers; wake it"):
            await attached(double, tmp_path)


async def test_a_sleeping_engine_is_told_and_woken(tmp_path: Path) -> None:
    recording = Recording()
    recording.pages |= {"/sleep?level=1": {"status": "sleeping"}, "/wake_up": {"status": "awake"}}
    async with serving(VllmDouble(recording)) as double:
        (engine,) = await attached(double, tmp_path)
        async with stepping(engine) as run:
            await engine.sleep()
            await run.until(lambda: any(report.events for report in run.reports), "the word that nothing is held")
            await engine.wake()


async def test_each_data_parallel_rank_is_a_worker(tmp_path: Path) -> None:
    recording = Recording()
    source = recording.pages["/kv_event_sources"]["0"]
    recording.pages["/kv_event_sources"] = {
        rank: {**source, "endpoint": f"tcp://127.0.0.1:{5557 + int(rank)}", "replay_endpoint": f"tcp://127.0.0.1:{6557 + int(rank)}"}
        for rank in ("0", "1")
    }
    async with serving(VllmDouble(recording)) as double:
        engines = await attached(double, tmp_path)
    assert [engine._headers for engine in engines] == [{"x-data-parallel-rank": "0"}, {"x-data-parallel-rank": "1"}]
    assert all(engine.card.publishes_events and not engine.card.can_sleep for engine in engines)


def test_the_gauges_of_a_rank_are_its_own() -> None:
    text = "\n".join(
        f'vllm:{name}{{engine="{rank}",model_name="m"}} {value}'
        for name, rank, value in (
            ("num_requests_running", 0, 3.0),
            ("num_requests_running", 1, 5.0),
            ("kv_cache_usage_perc", 0, 0.25),
            ("kv_cache_usage_perc", 1, 0.75),
        )
    )
    assert [(gauges_of(text, rank).running_count, gauges_of(text, rank).used_share) for rank in (0, 1)] == [(3, 0.25), (5, 0.75)]
    assert gauges_of(text).running_count == 8


@pytest.mark.parametrize(
    ("arguments", "count"),
    [([], 1), (["--data-parallel-size", "2"], 2), (["--data-parallel-size=4"], 4), (["-dp", "2"], 2), (["--data-parallel-size"], 1)],
)
def test_ranks_need_events_over_tcp(arguments: list[str], count: int) -> None:
    assert rank_count(arguments) == count
    config = json.loads(value_of(serve_command(settings(arguments=" ".join(arguments)), "m", 1), "--kv-events-config"))
    assert config["endpoint"] == ("tcp://*:0" if count > 1 else "ipc:///run/w/events")


def test_a_worker_with_a_phase_of_its_own_gets_the_connector() -> None:
    given = settings(hands_over=True, device="cpu")
    command = serve_command(given, "m", 1)
    config = json.loads(value_of(command, "--kv-transfer-config"))
    assert (config["kv_connector"], config["kv_role"], config["kv_load_failure_policy"]) == ("NixlConnector", "kv_both", "recompute")
    assert config["kv_buffer_device"] == "cpu"
    wanted = environment(given, {})
    assert (wanted["VLLM_NIXL_SIDE_CHANNEL_HOST"], wanted["UCX_NET_DEVICES"]) == ("127.0.0.1", "lo")
    assert wanted["VLLM_NIXL_SIDE_CHANNEL_PORT"] != environment(given, {})["VLLM_NIXL_SIDE_CHANNEL_PORT"]
    own = serve_command(settings(hands_over=True, arguments="--kv-transfer-config '{}'"), "m", 1)
    assert own.count("--kv-transfer-config") == 1
    assert "--kv-transfer-config" not in serve_command(settings(), "m", 1)


def test_without_nixl_it_is_started_without_the_connector() -> None:
    said = ["(EngineCore pid=7) WARNING nixl_utils.py:62] NIXL is not available", "RuntimeError: NIXL is not available"]
    assert unusable_flags(said) == {"--kv-transfer-config"}
    assert "--kv-transfer-config" not in serve_command(settings(hands_over=True), "m", 1, unusable_flags(said))


def test_a_key_is_not_on_the_command_line() -> None:
    given = settings(api_key="secret")
    assert "secret" not in " ".join(serve_command(given, "m", 1)) + repr(given)
    assert environment(given, {})["VLLM_API_KEY"] == "secret"


async def test_a_server_that_wants_another_key_says_so(tmp_path: Path) -> None:
    async with serving(VllmDouble(RECORDING, api_key="right")) as double:
        with pytest.raises(ModelLoadError, match="wants an API key, or another one: set POLYPHASE_ENGINE_API_KEY"):
            await attached(double, tmp_path)
        async with httpx.AsyncClient(base_url=double.url, headers={"authorization": "Bearer right"}) as client:
            assert (await client.get("/v1/models")).status_code == 200
