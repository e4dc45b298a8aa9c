"""Puts a worker before an OpenAI-compatible server together: what the server is like, and the card and the way to it that follow."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

from polyphase.core.errors import ConfigurationError, ModelLoadError
from polyphase.engines.openai.dialect import TokenDialect
from polyphase.engines.openai.liveness import FAR_INTERVAL_S, NEAR_INTERVAL_S, LivenessObserver
from polyphase.engines.openai.probe import ServerFacts, is_up, probe
from polyphase.engines.openai.settings import DEFAULT_KEY_VARIABLE, OpenAISettings
from polyphase.engines.served.access import Access, ApiKey, Passes, checked_base, is_loopback
from polyphase.engines.served.engine import ServedEngine
from polyphase.engines.served.gate import Gate
from polyphase.engines.served.model_files import ModelFacts, read_model_facts
from polyphase.wire.cards import ModelCard

log = logging.getLogger(__name__)

ATTACH_TIMEOUT_S = 60.0
BLOCK_SIZE = 16  # tokens, or words of four bytes; the engine's own is not known
BLOCK_COUNT = 1 << 17  # nor is this; so many that they never seem full
MAX_RUNNING = 64
MAX_BATCH_TOKENS = 16_384
UNTOLD_CONTEXT_LENGTH = 1 << 20
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


def load_openai_engine(settings: OpenAISettings) -> ServedEngine:
    """Returns once the server has answered.

    Raises: ModelLoadError, ConfigurationError. Owner: the caller closes the engine.
    """
    if settings.url is None:
        raise ConfigurationError("--engine openai attaches to a server that runs: write for example --attach http://127.0.0.1:8080")
    url = checked_base(settings.url)
    access = Access.to(url, key_of(settings))
    if access.key is not None and url.startswith("http:") and not is_loopback(url):
        log.warning("the API key goes to %s unencrypted; use https", url)
    folder = Path(settings.model).expanduser()
    model = read_model_facts(settings.model) if folder.is_dir() else None
    _wait_for(url, access)
    others = tuple(dict.fromkeys((settings.name or folder.name, folder.name, settings.model)))
    facts = probe(url, access, None if model is not None else settings.model, others)
    takes_tokens = model is not None and facts.tokens is not None
    if model is not None and not takes_tokens:
        log.warning("the server takes no token ids, or does not tell those of its answers: text goes there as text")
    _tell(facts, url, takes_tokens=takes_tokens)
    name = settings.name or facts.model
    card = _token_card(name, settings, facts, model) if model is not None and takes_tokens else _text_card(name, settings, facts)
    gate = Gate()
    path, interval_s = "/health" if facts.has_health else "/v1/models", NEAR_INTERVAL_S if is_loopback(url) else FAR_INTERVAL_S
    return ServedEngine(
        card,
        model.tokenizer if model is not None and takes_tokens else None,
        url,
        TokenDialect(facts.model, facts.tokens) if takes_tokens and facts.tokens is not None else None,
        [LivenessObserver(gate, path, access, interval_s)],
        passes=Passes(facts.model, facts.paths),
        access=access,
        gate=gate,
    )


def key_of(settings: OpenAISettings) -> ApiKey | None:
    """Raises: ConfigurationError, without whatever stands where a variable's name should."""
    named = settings.key_variable
    if named is None:
        found = settings.environment.get(DEFAULT_KEY_VARIABLE, "")
        return ApiKey(found) if found.strip() else None
    if not _VARIABLE.fullmatch(named) or not settings.environment.get(named, "").strip():
        raise ConfigurationError(
            "--engine-api-key-env names an environment variable that holds the API key, for example OPENAI_API_KEY; "
            "what it names is not set (never write the key itself there)"
        )
    return ApiKey(settings.environment[named])


def _tell(facts: ServerFacts, url: str, *, takes_tokens: bool) -> None:
    way = "tokens in, tokens out" if takes_tokens else "text"
    log.info("%s at %s: %s; takes %s", facts.model, url, way, ", ".join(sorted(facts.paths)))


def _text_card(name: str, settings: OpenAISettings, facts: ServerFacts) -> ModelCard:
    return ModelCard(
        name=name,
        tokenizer_json=b"",
        chat_template=None,
        bos_token=None,
        eos_token=None,
        bos_token_id=None,
        eos_token_ids=[],
        vocab_size=0,
        context_length=settings.context_length or facts.context_length,
        block_size=BLOCK_SIZE,
        block_count=BLOCK_COUNT,
        max_batch_tokens=settings.max_batch_tokens or MAX_BATCH_TOKENS,
        max_running=settings.max_running or MAX_RUNNING,
        can_hand_over=False,
        publishes_events=False,
        keeps_priorities=False,
        resumes_sampling=False,
        passes=sorted(facts.paths),
        takes_tokens=False,
        block_bytes=0,
        created_unix_s=int(time.time()),
        engine="openai",
    )


def _token_card(name: str, settings: OpenAISettings, facts: ServerFacts, model: ModelFacts) -> ModelCard:
    generation = model.generation
    return ModelCard(
        name=name,
        tokenizer_json=model.text.tokenizer_json,
        chat_template=model.text.chat_template,
        bos_token=model.text.bos_token,
        eos_token=model.text.eos_token,
        bos_token_id=model.bos_token_id,
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.vocab_size,
        context_length=settings.context_length or facts.context_length or model.context_length or UNTOLD_CONTEXT_LENGTH,
        block_size=BLOCK_SIZE,
        block_count=BLOCK_COUNT,
        max_batch_tokens=settings.max_batch_tokens or MAX_BATCH_TOKENS,
        max_running=settings.max_running or MAX_RUNNING,
        can_hand_over=False,
        publishes_events=False,
        keeps_priorities=False,
        resumes_sampling=False,
        passes=sorted(facts.paths),
        block_bytes=BLOCK_SIZE * model.kv_bytes_per_token,
        default_temperature=generation.get("temperature"),
        default_top_p=generation.get("top_p"),
        default_top_k=generation.get("top_k"),
        created_unix_s=int(time.time()),
        engine="openai",
    )


def _wait_for(url: str, access: Access) -> None:
    began_s = told_s = time.monotonic()
    while not is_up(url, access):
        now_s = time.monotonic()
        if now_s - began_s > ATTACH_TIMEOUT_S:
            tried = f"GET /v1/models, for {ATTACH_TIMEOUT_S:.0f} s"
            raise ModelLoadError(f"no server answers at {url} ({tried}); start it, or correct --attach")
        if now_s - told_s >= 5.0:
            told_s = now_s
            log.info("waiting for the server at %s: it does not answer yet (%.0f s)", url, now_s - began_s)
        time.sleep(0.2)
