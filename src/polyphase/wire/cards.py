"""Who is there and what they serve: registry entries, model cards, worker status."""

from __future__ import annotations

import enum

import msgspec

from polyphase.wire.events import Load

BLOCKS = "blocks"  # the kind of offer that is a `KvOffer`: copied by agents of the transfer library


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class RequestKind(enum.StrEnum):
    """What a request that is passed through asks of an engine; `ModelCard.passes` says which of these it takes."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    IMAGES = "images"  # in a conversation; so are the next two
    AUDIO = "audio"
    VIDEO = "video"
    EMBEDDINGS = "embeddings"
    RERANK = "rerank"
    SCORE = "score"
    CLASSIFY = "classify"
    TRANSCRIPTIONS = "transcriptions"
    TRANSLATIONS = "translations"
    SPEECH = "speech"


class WorkerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's page in the registry; small, because it is read on every change. The model card is asked of the worker."""

    worker_id: str
    epoch: int
    role: Role
    model: str
    pid: int
    began_ticks: int = 0  # when that process began, clock ticks since boot of its host; 0: not known
    host: str
    request_endpoint: str  # ZeroMQ ROUTER
    event_endpoint: str  # ZeroMQ PUB
    is_draining: bool = False
    is_asleep: bool = False  # or falling asleep: it takes no requests
    labels: dict[str, str] = {}  # where it stands or what it is, for example zone → eu-1; msgspec copies the default
    aliases: list[str] = []  # further names that clients may call the model by
    group: str = ""  # of the model's workers: those that share a weight, and between which a request may be split
    weight: float | None = None  # of the group, for its share of the model's requests; 0: only what no other group can take at once


class ModelCard(msgspec.Struct, frozen=True, kw_only=True, tag="card"):
    """All that a frontend needs to serve a model without seeing its files."""

    name: str
    tokenizer_json: bytes  # the file of the `tokenizers` library
    chat_template: str | None  # Jinja2 source; None: the model has none and /v1/chat/completions is refused
    bos_token: str | None
    eos_token: str | None
    bos_token_id: int | None
    eos_token_ids: list[int]
    vocab_size: int  # rows of the output layer
    context_length: int  # prompt and output together, tokens
    block_size: int  # tokens
    block_count: int
    max_batch_tokens: int  # token budget of one step
    max_running: int  # sequences in one step
    can_hand_over: bool  # it makes offers of `offer_kind` of what it has computed
    offer_kind: str = BLOCKS  # which offers it takes; a name and a digest of `offer_facts` for engines that move KV themselves; "": none
    offer_facts: dict[str, str] = {}  # what must be equal at both of them, so that people can be told what differs
    serves_whole: bool = True  # it computes prompts and generates; else only the half that its role says
    publishes_events: bool = True  # of its blocks; without them a router goes by what it sent there
    keeps_priorities: bool = True  # among the requests that wait there
    resumes_sampling: bool = True  # a sampled request that moved here goes on with the tokens that it would have had
    can_sleep: bool = False  # it gives the accelerator's memory free while nobody needs it
    takes_grammars: bool = False  # structured output
    resumes_grammars: bool = True  # also of a request of which something was emitted elsewhere; where not, such a one cannot move here
    adapters: list[str] = []  # LoRA adapters that it can run, by the names that clients call them; msgspec copies the default
    passes: list[str] = []  # `RequestKind`s of bodies that its engine takes as they are; msgspec copies the default
    takes_tokens: bool = True  # False: bodies only; there is no tokenizer then, and blocks are of text (frontend.passing)
    block_bytes: int
    default_temperature: float | None = None  # from the model's generation_config.json
    default_top_p: float | None = None
    default_top_k: int | None = None
    created_unix_s: int = 0
    engine: str = "torch"


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    entry: WorkerEntry
    load: Load
    uptime_s: float
    rss_bytes: int
    engine: str = ""
    abilities: list[str] = []  # as `engines.interface.Ability`
    misplaced_count: int = 0  # requests that run here and are not what the role is for: after a change of role, until they have moved
