"""Puts an SGLang worker together: a server launched or found, asked what it is like, and the observers and the card that follow from it."""

from __future__ import annotations

import logging
import os
import time
from urllib.parse import urlsplit

from polyphase.engines.served.dialect import Observer
from polyphase.engines.served.engine import ServedEngine
from polyphase.engines.served.kv_events import KvEventObserver, connectable
from polyphase.engines.served.launching import Launcher, await_attached, checked_url
from polyphase.engines.served.model_files import ModelFacts, read_model_facts
from polyphase.engines.served.polling import LoadPoll
from polyphase.engines.served.process import ServerProcess
from polyphase.engines.served.secrets import headers_of
from polyphase.engines.served.settings import ServerSettings
from polyphase.engines.sglang import flags, load
from polyphase.engines.sglang.dialect import GenerateDialect, Manners
from polyphase.engines.sglang.probe import ServerFacts, is_up, probe
from polyphase.wire.cards import ModelCard

log = logging.getLogger(__name__)

_UNTOLD_BATCH_TOKENS = (
    2048  # Source: SGLang's least default; the card's figure bounds what may wait, and how long a step is expected to take
)
_UNTOLD_RUNNING = 256


def load_sglang_engine(settings: ServerSettings) -> ServedEngine:
    """Returns once it has computed a token.

    Raises: ModelLoadError, ConfigurationError; then nothing is left running.
    Owner: the caller closes the engine.
    """
    model = read_model_facts(settings.model)  # what is wrong with it is better said before minutes have passed
    api_key = flags.api_key(settings, os.environ)
    if settings.attach is not None:
        url = checked_url(settings.attach)
        await_attached("SGLang", url, is_up)
        return _engine(settings, model, probe(url, api_key), url, None, api_key)
    settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    launched = _launcher(settings, model, api_key).launch(settings.start_timeout_s)
    try:
        return _engine(settings, model, probe(launched.url, api_key), launched.url, launched.server, api_key)
    except BaseException:
        launched.server.stop()
        raise


def _launcher(settings: ServerSettings, model: ModelFacts, api_key: str | None) -> Launcher:
    kv_tokens = _kv_tokens(settings, model)
    name = settings.name or settings.model
    return Launcher(
        name="sglang",
        command=lambda port, without: flags.serve_command(settings, name, port, without, kv_tokens),
        environment=flags.environment(settings, os.environ),
        optional=flags.OPTIONAL,
        is_up=is_up,
        progress=flags.progress_of,
        last_words=flags.last_words,
        secrets=(api_key,) if api_key else (),
    )


def _kv_tokens(settings: ServerSettings, model: ModelFacts) -> int | None:
    """SGLang is told of its KV cache in tokens. The model's figure is for keys and values of two bytes."""
    if settings.kv_bytes is None or not model.kv_bytes_per_token:
        return None
    widening = 2 if settings.dtype == "float32" else 1
    return max(1, settings.kv_bytes // (model.kv_bytes_per_token * widening))


def _engine(
    settings: ServerSettings, model: ModelFacts, facts: ServerFacts, url: str, server: ServerProcess | None, api_key: str | None
) -> ServedEngine:
    observers: list[Observer] = [_load_poll(facts)]
    events = _event_observer(facts, url)
    if events is not None:
        observers.append(events)
    manners = Manners(facts.takes_priority, facts.is_incremental, facts.is_deterministic, facts.takes_grammars, model.vocab_size)
    card = _card(settings, model, facts, publishes_events=events is not None)
    log.info("SGLang %s at %s: %d blocks of %d tokens", facts.version, url, card.block_count, card.block_size)
    return ServedEngine(card, model.tokenizer, url, GenerateDialect(manners), observers, server, headers=headers_of(api_key))


def _load_poll(facts: ServerFacts) -> LoadPoll:
    if facts.has_loads:
        return LoadPoll("SGLang", load.PATH, load.gauges_of)
    return LoadPoll("SGLang", load.OLD_PATH, lambda page: load.gauges_of_old(page, facts.kv_tokens))


def _event_observer(facts: ServerFacts, url: str) -> KvEventObserver | None:
    source = facts.events
    if facts.rank_count > 1:
        log.warning(
            "SGLang has %d data-parallel ranks behind one port: which of them holds what is of no use for routing", facts.rank_count
        )
    elif source is None:
        log.warning("this SGLang publishes no KV events (--kv-events-config): the router goes by what it sent there")
    elif not source.is_bound:
        log.warning(
            'this SGLang connects to %s and binds nothing, so that no KV event can be had: add "bind":true to --kv-events-config',
            source.endpoint,
        )
    else:
        host = urlsplit(url).hostname or "127.0.0.1"
        replay = connectable(source.replay_endpoint, host) if source.replay_endpoint else None
        return KvEventObserver(connectable(source.endpoint, host), replay, source.topic, facts.block_size)
    return None


def _card(settings: ServerSettings, model: ModelFacts, facts: ServerFacts, *, publishes_events: bool) -> ModelCard:
    generation = model.generation
    return ModelCard(
        name=settings.name or facts.model,
        tokenizer_json=model.text.tokenizer_json,
        chat_template=model.text.chat_template,
        bos_token=model.text.bos_token,
        eos_token=model.text.eos_token,
        bos_token_id=model.bos_token_id,
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.vocab_size,
        context_length=facts.context_length,
        block_size=facts.block_size,
        block_count=facts.kv_tokens // facts.block_size,
        max_batch_tokens=facts.max_batch_tokens or settings.max_batch_tokens or _UNTOLD_BATCH_TOKENS,
        max_running=facts.max_running or settings.max_running or _UNTOLD_RUNNING,
        can_hand_over=False,
        publishes_events=publishes_events,
        keeps_priorities=facts.takes_priority,
        resumes_sampling=facts.is_deterministic,
        takes_grammars=facts.takes_grammars,
        adapters=facts.adapters,
        block_bytes=facts.block_size * model.kv_bytes_per_token,
        default_temperature=generation.get("temperature"),
        default_top_p=generation.get("top_p"),
        default_top_k=generation.get("top_k"),
        created_unix_s=int(time.time()),
        engine="sglang",
    )
