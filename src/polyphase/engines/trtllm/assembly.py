"""Puts a TensorRT-LLM worker together: a server launched or found, asked what it is like, and the observers and the card that follow."""

from __future__ import annotations

import logging
import os
import time

from polyphase.core.errors import ModelLoadError
from polyphase.engines.served.dialect import Observer
from polyphase.engines.served.engine import ServedEngine
from polyphase.engines.served.launching import Launcher, await_attached, checked_url
from polyphase.engines.served.model_files import ModelFacts, read_model_facts
from polyphase.engines.served.offers import kind_of
from polyphase.engines.served.polling import LoadPoll
from polyphase.engines.served.process import ServerProcess
from polyphase.engines.served.secrets import headers_of
from polyphase.engines.served.settings import ServerSettings
from polyphase.engines.trtllm import flags, load
from polyphase.engines.trtllm.dialect import CompletionsDialect
from polyphase.engines.trtllm.kv_events import KvEventPoll
from polyphase.engines.trtllm.probe import ServerFacts, is_up, probe
from polyphase.wire.cards import ModelCard, Role

log = logging.getLogger(__name__)

_UNTOLD_BATCH_TOKENS = 8192  # Source: default of `max_num_tokens`
_UNTOLD_RUNNING = 2048  # Source: default of `max_batch_size`
_UNTOLD_BLOCKS = 4096


def load_trtllm_engine(settings: ServerSettings) -> ServedEngine:
    """Returns once it has computed a token.

    Raises: ModelLoadError, ConfigurationError; then nothing is left running.
    Owner: the caller closes the engine.
    """
    model = read_model_facts(settings.model)  # what is wrong with it is better said before minutes have passed
    api_key = settings.api_key
    if settings.attach is not None:
        url = checked_url(settings.attach)
        await_attached("TensorRT-LLM", url, is_up)
        return _engine(settings, model, probe(url, api_key), url, None, api_key)
    settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_options(settings, model)
    launched = _launcher(settings).launch(settings.start_timeout_s)
    try:
        return _engine(settings, model, probe(launched.url), launched.url, launched.server, None)
    except BaseException:
        launched.server.stop()
        raise


def _write_options(settings: ServerSettings, model: ModelFacts) -> None:
    kv_tokens = None
    if settings.kv_bytes is not None and model.kv_bytes_per_token:
        kv_tokens = max(1, settings.kv_bytes // model.kv_bytes_per_token)
    try:
        (settings.folder / flags.OPTIONS_FILE).write_text(flags.options(settings, kv_tokens))
    except OSError as error:
        raise ModelLoadError(f"cannot write the options of TensorRT-LLM to {settings.folder}: {error.strerror}") from error


def _launcher(settings: ServerSettings) -> Launcher:
    return Launcher(
        name="trtllm",
        command=lambda port, without: flags.serve_command(settings, port, without),
        environment=flags.environment(os.environ),
        unusable=lambda lines: (),
        is_up=is_up,
        progress=flags.progress_of,
    )


def _engine(
    settings: ServerSettings, model: ModelFacts, facts: ServerFacts, url: str, server: ServerProcess | None, api_key: str | None
) -> ServedEngine:
    observers: list[Observer] = [LoadPoll("TensorRT-LLM", load.PATH, load.LoadReader().gauges_of)]
    has_events = (facts.has_events or server is not None) and facts.rank_count == 1
    if has_events:
        observers.append(KvEventPoll(facts.block_size))
    else:
        log.warning(
            "this TensorRT-LLM publishes no KV events that can be used (kv_cache_config.event_buffer_max_size, one data-parallel rank): "
            "the router goes by what it sent there"
        )
    card = _card(settings, model, facts, publishes_events=has_events)
    log.info("TensorRT-LLM %s at %s: %d blocks of %d tokens", facts.version, url, card.block_count, card.block_size)
    dialect = CompletionsDialect(facts.model, model.tokenizer)
    prefill = dialect if card.can_hand_over else None
    return ServedEngine(card, model.tokenizer, url, dialect, observers, server, headers=headers_of(api_key), prefill=prefill)


def _card(settings: ServerSettings, model: ModelFacts, facts: ServerFacts, *, publishes_events: bool) -> ModelCard:
    generation = model.generation
    hands_over = settings.role is not Role.BOTH  # its servers are started for that
    offer_facts = {
        "version of TensorRT-LLM": facts.version,
        "model": facts.model,
        "dtype": settings.dtype,
        "tokens per block": str(facts.block_size),
    }
    return ModelCard(
        name=settings.name or facts.model,
        tokenizer_json=model.text.tokenizer_json,
        chat_template=model.text.chat_template,
        bos_token=model.text.bos_token,
        eos_token=model.text.eos_token,
        bos_token_id=model.bos_token_id,
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.vocab_size,
        context_length=settings.context_length or model.context_length or facts.block_count * facts.block_size or 4096,
        block_size=facts.block_size,
        block_count=facts.block_count or _UNTOLD_BLOCKS,
        max_batch_tokens=settings.max_batch_tokens or _UNTOLD_BATCH_TOKENS,
        max_running=settings.max_running or _UNTOLD_RUNNING,
        can_hand_over=hands_over,
        offer_kind=kind_of("trtllm", offer_facts) if hands_over else "",
        offer_facts=offer_facts if hands_over else {},
        publishes_events=publishes_events,
        keeps_priorities=False,
        resumes_sampling=False,
        takes_grammars=True,
        resumes_grammars=False,  # what was emitted is prompt to it, and its grammar would begin anew
        block_bytes=facts.block_size * model.kv_bytes_per_token,
        default_temperature=generation.get("temperature"),
        default_top_p=generation.get("top_p"),
        default_top_k=generation.get("top_k"),
        created_unix_s=int(time.time()),
        engine="trtllm",
    )
