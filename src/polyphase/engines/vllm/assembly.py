"""Puts a vLLM worker together: a server launched or found, asked what it is like, and the observers and the card that follow from that."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from urllib.parse import urlsplit

from polyphase.engines.served.access import Passes
from polyphase.engines.served.dialect import Observer, SleepPaths
from polyphase.engines.served.engine import ServedEngine
from polyphase.engines.served.kv_events import KvEventObserver, connectable
from polyphase.engines.served.launching import Launcher, await_attached, checked_url
from polyphase.engines.served.model_files import ModelFacts, read_model_facts
from polyphase.engines.served.process import ServerProcess
from polyphase.engines.served.secrets import headers_of
from polyphase.engines.vllm import flags
from polyphase.engines.vllm.dialects import dialect_of
from polyphase.engines.vllm.hand_over import NixlPrefill, kind_of
from polyphase.engines.vllm.metrics import MetricsObserver
from polyphase.engines.vllm.probe import EventSource, ServerFacts, is_up, probe
from polyphase.engines.vllm.settings import VllmSettings
from polyphase.transfer.memory import available_memory_bytes
from polyphase.wire.cards import ModelCard

log = logging.getLogger(__name__)

SLEEP_PATHS = SleepPaths("/sleep?level=1", "/wake_up")  # Source: vLLM's API with VLLM_SERVER_DEV_MODE
RANK_HEADER = "x-data-parallel-rank"
_UNTOLD_BATCH_TOKENS = 2048  # Source: vLLM's least default; the card's figure bounds what may wait, and how long a step is expected to take


def load_vllm_engines(settings: VllmSettings) -> list[ServedEngine]:
    """One for each data-parallel rank of the server. Returns once it has computed a token.

    Raises: ModelLoadError, ConfigurationError; then nothing is left running.
    Owner: the caller closes the engines; the first one is the server's owner.
    """
    model = read_model_facts(settings.model)  # what is wrong with it is better said before minutes have passed
    headers = headers_of(settings.api_key)
    if settings.attach is not None:
        url = checked_url(settings.attach)
        await_attached("vLLM", url, is_up)
        facts = probe(url, None, headers)
        return _engines(settings, model, facts, url, None, takes_priority=False)
    name = settings.name or settings.model
    settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings = replace(settings, kv_bytes=_kv_bytes(settings, model))
    launched = _launcher(settings, name).launch(settings.start_timeout_s)
    try:
        facts = probe(launched.url, name, headers)
        takes_priority = "--scheduling-policy" not in launched.without
        return _engines(settings, model, facts, launched.url, launched.server, takes_priority=takes_priority)
    except BaseException:
        launched.server.stop()
        raise


def _kv_bytes(settings: VllmSettings, model: ModelFacts) -> int | None:
    context_bytes = model.kv_bytes_per_token * (settings.context_length or model.context_length or 0)
    return flags.host_kv_bytes(settings, context_bytes, available_memory_bytes(), os.environ)


def _launcher(settings: VllmSettings, name: str) -> Launcher:
    return Launcher(
        name="vllm",
        command=lambda port, without: flags.serve_command(settings, name, port, without),
        environment=flags.environment(settings, os.environ),
        unusable=flags.unusable_flags,
        is_up=is_up,
        progress=flags.progress_of,
        secrets=(settings.api_key,) if settings.api_key else (),
    )


def _engines(
    settings: VllmSettings, model: ModelFacts, facts: ServerFacts, url: str, server: ServerProcess | None, *, takes_priority: bool
) -> list[ServedEngine]:
    way = "token-in/token-out" if facts.has_generate else "completions with token ids"
    log.info("vLLM %s at %s: %s, %d blocks of %d tokens", facts.version, url, way, facts.block_count, facts.block_size)
    dialect = dialect_of(facts.model, has_generate=facts.has_generate, takes_priority=takes_priority)
    prefill = NixlPrefill(dialect) if facts.hands_over else None
    if settings.hands_over and prefill is None:
        log.warning("this vLLM cannot hand over from prefill to decode: its answers do not say where blocks are")
    engines = []
    for rank in range(facts.rank_count):
        source = facts.events[rank] or (_own_source(settings) if server is not None and facts.rank_count == 1 else None)
        observers: list[Observer] = [MetricsObserver(rank=rank)]
        if source is not None:
            host = urlsplit(url).hostname or "127.0.0.1"
            replay = connectable(source.replay_endpoint, host) if source.replay_endpoint else None
            observers.append(KvEventObserver(connectable(source.endpoint, host), replay, source.topic, facts.block_size))
        else:
            log.warning("this vLLM publishes no KV events (--kv-events-config): the router goes by what it sent there")
        card = _card(settings, model, facts, publishes_events=source is not None, takes_priority=takes_priority)
        headers = headers_of(settings.api_key)
        if facts.rank_count > 1:
            headers[RANK_HEADER] = str(rank)
        owned = server if rank == 0 else None
        engines.append(
            ServedEngine(
                card,
                model.tokenizer,
                url,
                dialect,
                observers,
                owned,
                prefill=prefill,
                headers=headers,
                sleep_paths=SLEEP_PATHS if card.can_sleep else None,
                passes=Passes(facts.model, facts.paths),
            )
        )
    return engines


def _offer_facts(settings: VllmSettings, model: ModelFacts, facts: ServerFacts) -> dict[str, str]:
    """What has to be equal at two servers. Tensor-parallel sizes may differ."""
    return {
        "vLLM's version": facts.version,
        "the model's path": facts.root,
        "dtype": model.dtype if settings.dtype == "auto" else settings.dtype,
        "the KV cache's dtype": facts.cache_dtype,
        "block size": str(facts.block_size),
    }


def _own_source(settings: VllmSettings) -> EventSource:
    """What we told it, for versions that do not tell again."""
    config = flags.event_config(settings.folder)
    return EventSource(str(config["endpoint"]), str(config["replay_endpoint"]), str(config["topic"]))


def _card(settings: VllmSettings, model: ModelFacts, facts: ServerFacts, *, publishes_events: bool, takes_priority: bool) -> ModelCard:
    generation = model.generation
    offer_facts = _offer_facts(settings, model, facts) if facts.hands_over else {}
    return ModelCard(
        name=settings.name or facts.model,
        tokenizer_json=model.text.tokenizer_json,
        chat_template=model.text.chat_template,
        bos_token=model.text.bos_token,
        eos_token=model.text.eos_token,
        bos_token_id=model.bos_token_id,
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.vocab_size,
        context_length=facts.context_length or model.context_length or facts.block_count * facts.block_size,
        block_size=facts.block_size,
        block_count=facts.block_count,
        max_batch_tokens=settings.max_batch_tokens or _UNTOLD_BATCH_TOKENS,
        max_running=settings.max_running or flags.DEFAULT_MAX_RUNNING,
        can_hand_over=facts.hands_over,
        offer_kind=kind_of(offer_facts) if facts.hands_over else "",
        offer_facts=offer_facts,
        can_sleep=facts.can_sleep and facts.rank_count == 1,  # all ranks sleep at once
        publishes_events=publishes_events,
        keeps_priorities=takes_priority,
        resumes_sampling=False,
        passes=sorted(facts.paths),
        takes_grammars=facts.has_structured_outputs,
        resumes_grammars=False,  # what was emitted is prompt to it, and its grammar would begin anew
        block_bytes=facts.block_size * model.kv_bytes_per_token,
        default_temperature=generation.get("temperature"),
        default_top_p=generation.get("top_p"),
        default_top_k=generation.get("top_k"),
        adapters=list(facts.adapters),
        created_unix_s=int(time.time()),
        engine="vllm",
    )
