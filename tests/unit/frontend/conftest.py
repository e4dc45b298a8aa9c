"""A tiny tokenizer, a model card around it, and a frontend that serves it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from polyphase.frontend.models import ServedModel
from polyphase.frontend.settings import FrontendSettings
from polyphase.text import Tokenizer
from polyphase.wire.cards import ModelCard

from .stack import Stack, serving

STORY = "The quick brown fox jumps over the lazy dog. Größe 🙂 matters; naïve café. "
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    inner.train_from_iterator([STORY.replace("🙂", "")] * 4, trainer)
    return inner.to_str().encode()


@pytest.fixture(scope="session")
def card(tokenizer_json: bytes) -> ModelCard:
    vocab_size = Tokenizer.from_json(tokenizer_json).vocab_size
    return ModelCard(
        name="tiny",
        tokenizer_json=tokenizer_json,
        chat_template=TEMPLATE,
        bos_token=None,
        eos_token="<|end|>",
        bos_token_id=None,
        eos_token_ids=[0],
        vocab_size=vocab_size,
        context_length=512,
        block_size=16,
        block_count=256,
        max_batch_tokens=512,
        max_running=64,
        can_hand_over=True,
        block_bytes=1024,
        created_unix_s=1_700_000_000,
        engine="fake",
    )


@pytest.fixture(scope="session")
def model(card: ModelCard) -> ServedModel:
    return ServedModel.of(card)


@pytest.fixture(scope="session")
def story(model: ServedModel) -> list[int]:
    return model.tokenizer.encode(STORY)


@pytest.fixture
def settings() -> FrontendSettings:
    """A test overrides this fixture's value by parametrising it."""
    return FrontendSettings(migration_patience_s=0.3, request_timeout_s=30, grammar_cpu_s=0.3)


@pytest.fixture
async def stack(card: ModelCard, story: list[int], settings: FrontendSettings) -> AsyncIterator[Stack]:
    async with serving(card, story, settings) as running:
        yield running
