"""Puts an engine together: threads, model, memory, scheduler."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch

from polyphase.core.errors import ConfigurationError, ModelLoadError
from polyphase.engines.batching.grammars import Grammars
from polyphase.engines.batching.scheduler import SchedulerLimits
from polyphase.engines.batching.sizing import size_cache
from polyphase.engines.torch.card import eos_token_ids, read_text_facts
from polyphase.engines.torch.engine import EngineParts, TorchEngine
from polyphase.engines.torch.loading import LoadedModel, load_model
from polyphase.engines.torch.lora import Adapters, add_adapters
from polyphase.engines.torch.runner import ModelRunner
from polyphase.engines.torch.settings import TorchSettings
from polyphase.engines.torch.storage import DeviceStorage, HostStorage, KvStorage
from polyphase.text import GrammarVocabulary, Tokenizer
from polyphase.transfer.memory import available_memory_bytes
from polyphase.wire.cards import ModelCard
from polyphase.wire.kv import KvLayout

log = logging.getLogger(__name__)

_MAX_THREADS = 8  # beyond these a step gains little, and neighbours lose much
_DEFAULT_BATCH_TOKENS = {"cpu": 512, "cuda": 2048}
# Larger products use several cores better: on two of them, a prompt of 2,000 tokens is read a sixth faster in chunks of 1,024 than of 512.
_PREFILL_FACTOR = 2
# A step on the CPU is broken off between layers when its client left, whose blocks should be free within 100 ms. But smaller steps cost
# more: with the demo model 2 steps of 1,000 tokens take 230 ms of CPU, 11 of 180 tokens 280 ms.
_LAYER_MS = 40.0


def assemble(settings: TorchSettings) -> TorchEngine:
    torch.set_num_threads(settings.thread_count or min(_MAX_THREADS, _core_count()))
    loaded = load_model(settings)
    facts = read_text_facts(settings.model)
    try:
        tokenizer = Tokenizer.from_json(facts.tokenizer_json)
    except ConfigurationError as error:
        raise ModelLoadError(f"the tokenizer of {settings.model} cannot be used: {error.message}") from error
    adapters = add_adapters(loaded.model, settings.adapters) if settings.adapters else None
    layout = _layout(loaded, settings.block_size, adapters)
    size = size_cache(
        block_size=settings.block_size,
        block_bytes=layout.block_bytes,
        kv_bytes=settings.kv_bytes,
        is_device=loaded.device.type != "cpu",
        available_bytes=_available_bytes(loaded.device),
        model_context_length=loaded.max_context_length,
        wanted_context_length=settings.context_length,
    )
    storage: KvStorage
    if loaded.device.type == "cpu":
        storage = HostStorage(layout, size.block_count)
    else:
        storage = DeviceStorage(layout, size.block_count, loaded.device)
    max_batch_tokens = settings.max_batch_tokens or _DEFAULT_BATCH_TOKENS[loaded.device.type]
    generation = loaded.generation
    eos_ids = eos_token_ids(generation, loaded.config)
    grammars = _grammars(tokenizer, loaded.vocab_size, eos_ids)
    card = ModelCard(
        name=settings.name or _served_name(settings.model),
        tokenizer_json=facts.tokenizer_json,
        chat_template=facts.chat_template,
        bos_token=facts.bos_token,
        eos_token=facts.eos_token,
        bos_token_id=generation.bos_token_id if isinstance(generation.bos_token_id, int) else None,
        eos_token_ids=eos_ids,
        vocab_size=loaded.vocab_size,
        context_length=size.context_length,
        block_size=settings.block_size,
        block_count=size.block_count,
        max_batch_tokens=max_batch_tokens,
        max_running=settings.max_running,
        can_hand_over=True,
        takes_grammars=grammars is not None,
        block_bytes=layout.block_bytes,
        default_temperature=generation.temperature,
        default_top_p=generation.top_p,
        default_top_k=generation.top_k,
        adapters=adapters.names if adapters else [],
        created_unix_s=int(time.time()),
    )
    parts = EngineParts(
        card=card,
        storage=storage,
        runner=ModelRunner(loaded.model, storage, loaded.device, adapters),
        tokenizer=tokenizer,
        limits=SchedulerLimits(
            max_batch_tokens,
            settings.max_running,
            settings.max_waiting,
            # Whoever sets a limit means it for every step.
            max_prefill_batch_tokens=max_batch_tokens if settings.max_batch_tokens else _PREFILL_FACTOR * max_batch_tokens,
            longest_step_ms=None if settings.max_batch_tokens or loaded.device.type != "cpu" else _LAYER_MS * len(loaded.layers),
        ),
        lease_ns=int(settings.lease_s * 1e9),
        grammars=grammars,
    )
    return TorchEngine(parts)


def _grammars(tokenizer: Tokenizer, vocab_size: int, eos_ids: list[int]) -> Grammars | None:
    """None, and a word in the log, for the few tokenizers that the library does not understand."""
    try:
        return Grammars(GrammarVocabulary(tokenizer, vocab_size, eos_ids))
    except ConfigurationError as error:
        log.warning("no structured output with this model: %s", error.message)
        return None


def _core_count() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _layout(loaded: LoadedModel, block_size: int, adapters: Adapters | None) -> KvLayout:
    shape = loaded.layers[0]
    dtype = str(loaded.dtype).removeprefix("torch.")
    elements = len(loaded.layers) * 2 * block_size * shape.kv_head_count * shape.head_dim
    return KvLayout(
        dtype=dtype,
        layer_count=len(loaded.layers),
        kv_head_count=shape.kv_head_count,
        head_dim=shape.head_dim,
        block_size=block_size,
        block_bytes=elements * loaded.dtype.itemsize,
        # KV of an adapter is named by the adapter's name, so workers exchange blocks only if they mean the same by all of them.
        fingerprint=f"{loaded.fingerprint}+{adapters.digest}" if adapters else loaded.fingerprint,
    )


def _available_bytes(device: torch.device) -> int | None:
    if device.type == "cpu":
        return available_memory_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def _served_name(model: str) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
