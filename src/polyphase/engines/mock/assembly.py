"""Puts a mock engine together: a tokenizer from a folder, an imagined model and accelerator, and the memory these leave for KV."""

from __future__ import annotations

import time
from pathlib import Path

from polyphase.advisor.shapes import AttentionKind
from polyphase.core.errors import ConfigurationError, ModelLoadError
from polyphase.engines.batching.scheduler import SchedulerLimits
from polyphase.engines.batching.sizing import CacheSize, size_cache
from polyphase.engines.mock.imagined import Imagined, imagine
from polyphase.engines.mock.machine import MockParts
from polyphase.engines.mock.settings import MockSettings
from polyphase.engines.mock.storage import BLOCK_BYTES, MockStorage
from polyphase.engines.mock.timing import imagined_times
from polyphase.engines.mock.tokens import MockTokens, speakable_ids
from polyphase.engines.text_files import as_token_ids, read_json, text_facts
from polyphase.text import Tokenizer
from polyphase.wire.cards import ModelCard
from polyphase.wire.kv import KvLayout

_DEFAULT_BATCH_TOKENS = 8192
_USABLE_MEMORY = 0.9  # of the accelerator's; Source: vLLM's default


def assemble_mock(settings: MockSettings, *, is_shared: bool) -> MockParts:
    """`is_shared`: its blocks can be handed over to other processes.

    Raises: ModelLoadError if the folder has no usable tokenizer; ConfigurationError if the imagined model does not fit.
    """
    imagined = imagine(settings.shape, settings.accelerator)
    folder = Path(settings.model).expanduser()

    def read(name: str) -> bytes | None:
        return (folder / name).read_bytes() if (folder / name).is_file() else None

    tokenizer_json = read("tokenizer.json")
    if tokenizer_json is None:
        raise ModelLoadError(f"{settings.model} has no tokenizer.json; the mock engine needs a folder with one, for example that of demo")
    facts = text_facts(settings.model, read, tokenizer_json)
    try:
        tokenizer = Tokenizer.from_json(tokenizer_json)
    except ConfigurationError as error:
        raise ModelLoadError(f"the tokenizer of {settings.model} cannot be used: {error.message}") from error
    generation = read_json(settings.model, read, "generation_config.json")
    config = read_json(settings.model, read, "config.json")
    eos_ids = as_token_ids(generation.get("eos_token_id")) or as_token_ids(config.get("eos_token_id")) or []
    size = _size(settings, imagined)
    max_batch_tokens = settings.max_batch_tokens or _DEFAULT_BATCH_TOKENS
    card = ModelCard(
        name=settings.name or folder.resolve().name,
        tokenizer_json=facts.tokenizer_json,
        chat_template=facts.chat_template,
        bos_token=facts.bos_token,
        eos_token=facts.eos_token,
        bos_token_id=tokenizer.token_id(facts.bos_token) if facts.bos_token else None,
        eos_token_ids=eos_ids,
        vocab_size=max(tokenizer.vocab_size, int(config.get("vocab_size") or 0)),
        context_length=size.context_length,
        block_size=settings.block_size,
        block_count=size.block_count,
        max_batch_tokens=max_batch_tokens,
        max_running=settings.max_running,
        can_hand_over=is_shared,
        block_bytes=settings.block_size * imagined.kv_bytes_per_token,
        adapters=list(settings.adapters),
        created_unix_s=int(time.time()),
        engine="mock",
    )
    return MockParts(
        card=card,
        storage=MockStorage(_layout(settings, imagined), size.block_count, is_shared=is_shared),
        tokenizer=tokenizer,
        tokens=MockTokens(speakable_ids(tokenizer), eos_ids[0] if eos_ids else None),
        times=imagined_times(imagined, settings.speedup),
        limits=SchedulerLimits(max_batch_tokens, settings.max_running, settings.max_waiting),
        lease_ns=int(settings.lease_s * 1e9),
    )


def _size(settings: MockSettings, imagined: Imagined) -> CacheSize:
    kv_bytes = settings.kv_bytes or int(_USABLE_MEMORY * imagined.memory_bytes - imagined.weight_bytes)
    if kv_bytes <= 0:
        raise ConfigurationError(
            f"the weights of the mock model {settings.shape} take {imagined.weight_bytes / 1e9:.0f} GB, which leaves no room for KV on "
            f"{settings.accelerator}; take more of them, for example {4 * imagined.accelerator_count}x{imagined.setting.accelerator.name}"
        )
    return size_cache(
        block_size=settings.block_size,
        block_bytes=settings.block_size * imagined.kv_bytes_per_token,
        kv_bytes=kv_bytes,
        is_device=True,
        available_bytes=None,
        model_context_length=imagined.setting.shape.context_length,
        wanted_context_length=settings.context_length,
    )


def _layout(settings: MockSettings, imagined: Imagined) -> KvLayout:
    shape = imagined.setting.shape
    is_latent = shape.attention.kind is AttentionKind.LATENT
    return KvLayout(
        dtype="float16",
        layer_count=shape.full_layer_count + shape.windowed_layer_count,
        kv_head_count=shape.attention.kv_head_count,
        head_dim=shape.attention.cached_numbers if is_latent else shape.attention.head_dim,
        block_size=settings.block_size,
        block_bytes=BLOCK_BYTES,
        fingerprint=f"mock of {settings.shape}",
    )
