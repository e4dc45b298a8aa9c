"""Puts an SGLang worker together: a server launched or found, asked what it is like, and the observers and the card that follow from it."""

from __future__ import annotations

import logging
import os
import time
from urllib.parse import urlsplit

from polyphase.core.errors import ModelLoadError
from polyphase.engines.served.dialect import Observer
from polyphase.engines.served.engine import ServedEngine
from polyphase.engines.served.kv_events import KvEventObserver, connectable
from polyphase.engines.served.launching import Launcher, await_attached, checked_url, unknown_flags
from polyphase.engines.served.model_files import ModelFacts, read_model_facts
from polyphase.engines.served.offers import kind_of
from polyphase.engines.served.polling import LoadPoll
from polyphase.engines.served.process import ServerProcess
from polyphase.engines.served.secrets import headers_of
from polyphase.engines.served.settings import ServerSettings
from polyphase.engines.sglang import flags, load
from polyphase.engines.sglang.bootstrap import BootstrapPrefill
from polyphase.engines.sglang.dialect import GenerateDialect, Manners
from polyphase.engines.sglang.probe import ServerFacts, is_up, probe
from polyphase.wire.cards import ModelCard, Role

log = logging.getLogger(__name__)

_UNTOLD_BATCH_TOKENS = (
    2048  # Source: SGLang's least default; the card's figure bounds what may wait, and how long a step is expected to take
)
_UNTOLD_RUNNING = 256


def load_sglang_engines(settings: ServerSettings) -> list[ServedEngine]:
    """One for each data-parallel rank of the server. Returns once it has computed a token.

    Raises: ModelLoadError, ConfigurationError; then nothing is left running.
    Owner: the caller closes the engines; the first one is the server's owner.
    """
    model = read_model_facts(settings.model)  # what is wrong with it is better said before minutes have passed
    api_key = flags.api_key(settings)
    if settings.attach is not None:
        url = checked_url(settings.attach)
        await_attached("SGLang", url, is_up)
        return _engines(settings, model, probe(url, api_key), url, None, api_key)
    settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    launched = _launcher(settings, model, api_key).launch(settings.start_timeout_s)
    try:
        return _engines(settings, model, probe(launched.url, api_key), launched.url, launched.server, api_key)
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
        unusable=lambda lines: unknown_flags(lines) & flags.OPTIONAL.keys(),
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


def _engines(
    settings: ServerSettings, model: ModelFacts, facts: ServerFacts, url: str, server: ServerProcess | None, api_key: str | None
) -> list[ServedEngine]:
    _check_half(settings, facts)
    host = urlsplit(url).hostname or "127.0.0.1"
    log.info("SGLang %s at %s: %d blocks of %d tokens", facts.version, url, facts.kv_tokens // facts.block_size, facts.block_size)
    engines = []
    for rank in range(facts.rank_count):
        events = _event_observer(facts, host, rank)
        card = _card(settings, model, facts, publishes_events=events is not None or not facts.keeps_prefixes)
        dialect = GenerateDialect(_manners(model, facts, rank if facts.rank_count > 1 else None))
        prefill = None
        if facts.mode != "null":
            prefill = BootstrapPrefill(dialect, host, facts.bootstrap_port or 0, facts.context_length)
        observers: list[Observer] = [_load_poll(facts, rank)]
        if events is not None:
            observers.append(events)
        owned = server if rank == 0 else None
        engines.append(ServedEngine(card, model.tokenizer, url, dialect, observers, owned, prefill=prefill, headers=headers_of(api_key)))
    return engines


def _check_half(settings: ServerSettings, facts: ServerFacts) -> None:
    """Raises: ModelLoadError if the server was started for another role."""
    if (settings.role is Role.BOTH) == (facts.mode == "null") and facts.mode in ("null", settings.role):
        return
    was = "for whole requests" if facts.mode == "null" else f"with --disaggregation-mode {facts.mode}"
    is_to_be = "serve whole requests" if settings.role is Role.BOTH else f"be a {settings.role} worker"
    raise ModelLoadError(f"this SGLang was started {was}, and its worker is to {is_to_be}; start the server or the worker otherwise")


def _manners(model: ModelFacts, facts: ServerFacts, rank: int | None) -> Manners:
    return Manners(
        takes_priority=facts.takes_priority,
        is_incremental=facts.is_incremental,
        is_deterministic=facts.is_deterministic,
        takes_grammars=facts.takes_grammars,
        vocab_size=model.vocab_size,
        mode=facts.mode,
        rank=rank,
    )


def _offer_facts(facts: ServerFacts) -> dict[str, str]:
    """What has to be equal at two servers. Tensor-parallel sizes may differ."""
    return {
        "SGLang's version": facts.version,
        "the model": facts.model,
        "the KV cache's dtype": facts.kv_dtype,
        "page size": str(facts.block_size),
        "the transfer backend": facts.transfer_backend,
    }


def _load_poll(facts: ServerFacts, rank: int) -> LoadPoll:
    if facts.has_loads:
        return LoadPoll("SGLang", f"{load.PATH}?dp_rank={rank}", load.gauges_of)
    return LoadPoll("SGLang", load.OLD_PATH, lambda page: load.gauges_of_old(page, facts.kv_tokens))


def _event_observer(facts: ServerFacts, host: str, rank: int) -> KvEventObserver | None:
    source = facts.events
    if not facts.keeps_prefixes:
        log.info("this SGLang keeps no prefixes: there is nothing to tell of")
    elif source is None:
        log.warning("this SGLang publishes no KV events (--kv-events-config): the router goes by what it sent there")
    elif not source.can_be_heard:
        log.warning('this SGLang sends its KV events to %s: add "bind":true to --kv-events-config', source.endpoint)
    else:
        of_rank = source.of_rank(rank)
        replay = connectable(of_rank.replay_endpoint, host) if of_rank.replay_endpoint else None
        return KvEventObserver(connectable(of_rank.endpoint, host), replay, of_rank.topic, facts.block_size)
    return None


def _card(settings: ServerSettings, model: ModelFacts, facts: ServerFacts, *, publishes_events: bool) -> ModelCard:
    generation = model.generation
    offer_facts = _offer_facts(facts) if facts.mode != "null" else {}
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
        can_hand_over=facts.mode == "prefill",
        offer_kind=kind_of("sglang", offer_facts) if offer_facts else "",
        offer_facts=offer_facts,
        serves_whole=facts.mode == "null",
        publishes_events=publishes_events,
        keeps_priorities=facts.takes_priority,
        resumes_sampling=facts.is_deterministic,
        takes_grammars=facts.takes_grammars,
        resumes_grammars=False,  # what was emitted is prompt to it, and its grammar would begin anew
        adapters=facts.adapters,
        block_bytes=facts.block_size * model.kv_bytes_per_token,
        default_temperature=generation.get("temperature"),
        default_top_p=generation.get("top_p"),
        default_top_k=generation.get("top_k"),
        created_unix_s=int(time.time()),
        engine="sglang",
    )
