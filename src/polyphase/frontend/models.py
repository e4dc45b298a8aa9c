"""The models that are served right now, each made from the card that its first worker handed out, and every name that stands for one.

name      a model   ◄── its workers, of whatever engines: same text in, same text out
alias     the same model, by another name
adapter   the model with a LoRA adapter: a model of its own to clients, on those workers that have it
"""

from __future__ import annotations

import enum
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from polyphase.core.errors import ConfigurationError, ModelNotFound, NoWorkers
from polyphase.frontend.chat import ChatTemplate, TemplateFailed
from polyphase.text import Tokenizer
from polyphase.wire.cards import ModelCard

log = logging.getLogger(__name__)


Identity = Mapping[str, str]
_IDENTIFYING = ("takes_tokens", "tokenizer_json", "chat_template", "eos_token_ids", "vocab_size")


def identity_of(card: ModelCard) -> Identity:
    """All that must be equal so that a request can run on, or move between, workers of one name; long fields as digests.

    How long the context is, in which blocks KV lies and what else an engine can may differ: the model's context is the shortest, and the
    router knows each worker's block size.
    """
    return {name: hashlib.sha256(_as_bytes(getattr(card, name))).hexdigest() for name in _IDENTIFYING}


def _as_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else repr(sorted(value) if isinstance(value, list) else value).encode()


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


class NameKind(enum.Enum):
    MODEL = "model"
    ALIAS = "alias"
    ADAPTER = "LoRA adapter"


@dataclass(frozen=True, slots=True)
class Addressed:
    """What a name stands for that a client may give as `model`."""

    name: str
    kind: NameKind
    model: ServedModel

    @property
    def adapter(self) -> str | None:
        return self.name if self.kind is NameKind.ADAPTER else None

    @property
    def true_name(self) -> str:
        """An alias stands for its model; an adapter is a model of its own."""
        return self.model.name if self.kind is NameKind.ALIAS else self.name


@dataclass(frozen=True, slots=True)
class _Offer:
    """What one worker contributes to its model."""

    context_length: int
    names: Mapping[str, NameKind]


@dataclass(slots=True)
class _Served:
    model: ServedModel
    offers: dict[str, _Offer] = field(default_factory=dict)  # by worker id

    def names(self) -> dict[str, NameKind]:
        return {name: kind for offer in self.offers.values() for name, kind in offer.names.items()}

    def settle(self) -> None:
        """Every worker must be able to go on with any request, so the shortest context is the model's."""
        length = min(offer.context_length for offer in self.offers.values())
        if length != self.model.card.context_length:
            self.model = replace(self.model, card=msgspec.structs.replace(self.model.card, context_length=length))


class Models:
    """A model appears with its first worker and disappears with its last one; so does each alias and adapter, with those that have it."""

    def __init__(self) -> None:
        self._served: dict[str, _Served] = {}
        self._names: dict[str, tuple[str, NameKind]] = {}  # all that clients may say: the model that it belongs to, and what it is there
        self._former: set[str] = set()  # names that were served once, and are not now
        self._retired: dict[str, ServedModel] = {}  # kept for the restart of its only worker; one per name ever served

    def __iter__(self) -> Iterator[Addressed]:
        """Every name, those of one model together: itself, its aliases, its adapters."""
        order = list(NameKind)
        for name, (owner, kind) in sorted(self._names.items(), key=lambda item: (item[1][0], order.index(item[1][1]), item[0])):
            yield Addressed(name, kind, self._served[owner].model)

    def names(self) -> list[str]:
        return [addressed.name for addressed in self]

    def takes_text(self) -> bool:
        """Whether any model is there whose workers take text and no tokens."""
        return any(not served.model.takes_tokens for served in self._served.values())

    def known(self, name: str, identity: Identity) -> ServedModel | None:
        """The model, if it is or was served, so that its tokenizer need not be built again."""
        served = self._served.get(name)
        model = served.model if served else self._retired.get(name)
        return model if model is not None and model.identity == identity else None

    def add_worker(self, worker_id: str, model: ServedModel, card: ModelCard | None = None, aliases: Iterable[str] = ()) -> None:
        """`card` is the worker's own; None: the model's.

        Raises: ConfigurationError if others serve another model under this name, or one of its names is something else already; the
        worker must then get no requests.
        """
        card = card or model.card
        offer = _Offer(card.context_length, _names_of(worker_id, model.name, aliases, card.adapters))
        self._check_names(worker_id, model.name, offer.names)
        served = self._served.get(model.name)
        if served is None:
            served = self._served[model.name] = _Served(model)
            self._retired.pop(model.name, None)
            log.info("model %s is served", model.name)
        elif served.model.identity != model.identity:
            raise ConfigurationError(_other_model(worker_id, model, served))
        served.offers[worker_id] = offer
        served.settle()
        self._note_names()

    def remove_worker(self, worker_id: str) -> None:
        for name, served in list(self._served.items()):
            if served.offers.pop(worker_id, None) is None:
                continue
            if served.offers:
                served.settle()
            else:
                self._retired[name] = served.model
                del self._served[name]
                log.warning("model %s is not served any more: its last worker is gone", name)
        self._note_names()

    def resolve(self, name: str) -> Addressed:
        """Raises: NoWorkers if it was served before, or nothing is; ModelNotFound otherwise."""
        found = self._names.get(name)
        if found is not None:
            owner, kind = found
            return Addressed(name, kind, self._served[owner].model)
        if name in self._former or not self._served:
            raise NoWorkers(f"no worker serves the model {name[:100]!r} at the moment; retry when one has joined", retry_after_s=5)
        raise ModelNotFound(f"the model {name[:100]!r} does not exist; served are: {', '.join(self.names())}", param="model")

    def _check_names(self, worker_id: str, model: str, names: Mapping[str, NameKind]) -> None:
        for name, kind in names.items():
            owner, earlier = self._names.get(name, (model, kind))
            if (owner, earlier) != (model, kind):
                is_already = "a model" if earlier is NameKind.MODEL else f"{_with_article(earlier)} of the model {owner!r}"
                remedy = "--served-model-name" if kind is NameKind.MODEL else "name for it"
                raise ConfigurationError(
                    f"worker {worker_id} brings {name!r} as {_with_article(kind)}{'' if kind is NameKind.MODEL else f' of {model!r}'}, "
                    f"and that is {is_already} already; start it with another {remedy}"
                )

    def _note_names(self) -> None:
        before = self._names.keys()
        names = {name: (model, kind) for model, served in self._served.items() for name, kind in served.names().items()}
        self._former |= before - names.keys()
        self._former -= names.keys()
        self._names = names


def _names_of(worker_id: str, model: str, aliases: Iterable[str], adapters: Iterable[str]) -> dict[str, NameKind]:
    """Raises: ConfigurationError if one name stands for two things."""
    names = {model: NameKind.MODEL}
    for kind, given in ((NameKind.ALIAS, aliases), (NameKind.ADAPTER, adapters)):
        for name in given:
            if names.setdefault(name, kind) is not kind and (kind, names[name]) != (NameKind.ALIAS, NameKind.MODEL):
                raise ConfigurationError(f"worker {worker_id} uses {name!r} for {_with_article(names[name])} and {_with_article(kind)}")
    return names


def _with_article(kind: NameKind) -> str:
    return f"an {kind.value}" if kind is NameKind.ALIAS else f"a {kind.value}"


def _other_model(worker_id: str, model: ServedModel, served: _Served) -> str:
    names = ", ".join(name for name in _IDENTIFYING if served.model.identity[name] != model.identity[name])
    return (
        f"worker {worker_id} serves another model as {model.name!r} than {', '.join(sorted(served.offers))}: "
        f"{names} differ; start it with another --served-model-name"
    )
