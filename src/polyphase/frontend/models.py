"""The models that are served right now, each made from the card that its first worker handed out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from polyphase.core.errors import ConfigurationError, ModelNotFound, NoWorkers
from polyphase.frontend.chat import ChatTemplate, TemplateFailed
from polyphase.text import Tokenizer
from polyphase.wire.cards import ModelCard

log = logging.getLogger(__name__)


Identity = Mapping[str, str]
_IDENTIFYING = ("takes_tokens", "tokenizer_json", "chat_template", "eos_token_ids", "vocab_size", "context_length", "block_size")


def identity_of(card: ModelCard) -> Identity:
    """All that must be equal so that a request can run on, or move between, workers of one name; long fields as digests."""
    return {name: hashlib.sha256(_as_bytes(getattr(card, name))).hexdigest() for name in _IDENTIFYING}


def _as_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else repr(value).encode()


def without_tokenizer(card: ModelCard) -> ModelCard:
    """The card, without the megabytes that are in the tokenizer by now."""
    return msgspec.structs.replace(card, tokenizer_json=b"")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as a frontend knows it. Without a chat template, `chat_error` says why."""

    card: ModelCard  # without the tokenizer's file
    own_tokenizer: Tokenizer | None  # None: its workers take no tokens, and what is asked of it is passed through
    template: ChatTemplate | None
    chat_error: str | None
    identity: Identity
    end_ids: frozenset[int]  # EOS

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def takes_tokens(self) -> bool:
        return self.own_tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """Not asked for by anybody where the model takes no tokens."""
        assert self.own_tokenizer is not None, self.name
        return self.own_tokenizer

    @classmethod
    def of(cls, card: ModelCard, identity: Identity | None = None) -> ServedModel:
        """Cost: up to a second for a vocabulary of 150,000 tokens. Raises: ConfigurationError if the card's tokenizer is broken."""
        template, chat_error = None, f"the model {card.name!r} has no chat template; use /v1/completions"
        try:
            template = ChatTemplate.of(card)
        except TemplateFailed as error:
            chat_error = error.message
            log.error("model %s: %s; /v1/chat/completions is refused", card.name, error.message)
        return cls(
            card=without_tokenizer(card),
            own_tokenizer=Tokenizer.from_json(card.tokenizer_json) if card.takes_tokens else None,
            template=template,
            chat_error=None if template else chat_error,
            identity=identity or identity_of(card),
            end_ids=frozenset(card.eos_token_ids),
        )


@dataclass(slots=True)
class _Served:
    model: ServedModel
    worker_ids: set[str] = field(default_factory=set)


class Models:
    """A model appears with its first worker and disappears with its last one."""

    def __init__(self) -> None:
        self._served: dict[str, _Served] = {}
        self._retired: dict[str, ServedModel] = {}  # kept for the restart of its only worker; one per name ever served

    def __iter__(self) -> Iterator[ServedModel]:
        return iter([self._served[name].model for name in sorted(self._served)])

    def names(self) -> list[str]:
        return sorted(self._served)

    def takes_text(self) -> bool:
        """Whether any model is there whose workers take text and no tokens."""
        return any(not served.model.takes_tokens for served in self._served.values())

    def known(self, name: str, identity: Identity) -> ServedModel | None:
        """The model, if it is or was served, so that its tokenizer need not be built again."""
        served = self._served.get(name)
        model = served.model if served else self._retired.get(name)
        return model if model is not None and model.identity == identity else None

    def add_worker(self, worker_id: str, model: ServedModel) -> None:
        """Raises: ConfigurationError if others serve another model under this name; the worker must then get no requests."""
        served = self._served.get(model.name)
        if served is None:
            served = self._served[model.name] = _Served(model)
            self._retired.pop(model.name, None)
            log.info("model %s is served", model.name)
        elif served.model.identity != model.identity:
            names = ", ".join(name for name in _IDENTIFYING if served.model.identity[name] != model.identity[name])
            raise ConfigurationError(
                f"worker {worker_id} serves another model as {model.name!r} than {', '.join(sorted(served.worker_ids))}: "
                f"{names} differ; start it with another name"
            )
        served.worker_ids.add(worker_id)

    def remove_worker(self, worker_id: str) -> None:
        for name, served in list(self._served.items()):
            served.worker_ids.discard(worker_id)
            if not served.worker_ids:
                self._retired[name] = served.model
                del self._served[name]
                log.warning("model %s is not served any more: its last worker is gone", name)

    def get(self, name: str) -> ServedModel:
        """Raises: NoWorkers if the model was served before, or nothing is; ModelNotFound otherwise."""
        served = self._served.get(name)
        if served is not None:
            return served.model
        if name in self._retired or not self._served:
            raise NoWorkers(f"no worker serves the model {name[:100]!r} at the moment; retry when one has joined", retry_after_s=5)
        raise ModelNotFound(f"the model {name[:100]!r} does not exist; served are: {', '.join(self.names())}", param="model")
