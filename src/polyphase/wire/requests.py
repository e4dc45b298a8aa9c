"""The request channel between a frontend (or a peer worker, or the command line) and a worker.

To the worker go `Submit`, `Forward`, `ReadOn`, `PullAhead`, `Cancel`, `HandOver`, `ReleaseLease`, `SwitchRole`, `SwitchSleep`, `Query` and
`FindBlocks`; back come `StepOutputs` (one message per engine step and peer, with the new tokens of all that peer's requests, and pieces of
answers that are passed through) and `Answer`s to what has a query id. Every submitted or forwarded request ends in exactly one
`SequenceOutput` whose `finish_reason` is not None.
"""

from __future__ import annotations

import enum

import msgspec

from polyphase.wire.cards import ModelCard, Role, WorkerStatus
from polyphase.wire.events import Load, MissedBatches, SnapshotPage
from polyphase.wire.kv import KvPart, Offer


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Ranges are checked by the frontend.

    `seed` is always set: the frontend draws one if the client gave none. The random number for output position i depends on
    `seed` and i only, so the same seed gives the same tokens in any batch and after a migration.
    """

    seed: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    top_logprobs: int | None = None  # None: no log-probabilities; 0: of the chosen token only


class GrammarKind(enum.StrEnum):
    JSON = "json"  # any JSON object; `text` is empty
    JSON_SCHEMA = "json_schema"  # `text` is the schema, as JSON
    REGEX = "regex"
    CHOICE = "choice"  # `text` is a JSON list of the strings to choose from
    EBNF = "ebnf"


class Grammar(msgspec.Struct, frozen=True):
    """What the output, from its first token on, has to be a sentence of."""

    kind: GrammarKind
    text: str


class StopConditions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When a sequence ends. Counts are of output tokens, including those already emitted elsewhere."""

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    stop_strings: list[str] = []


class KvHolder(msgspec.Struct, frozen=True):
    """Another worker that is said to have the KV of a request's first `token_count` tokens in its prefix cache.

    A hint: it may hold less, or be gone. `compute_ms`: what it would take to compute those of them that the reader does not hold itself,
    None if nobody knows; so long pulling may take, and not longer.
    """

    worker_id: str
    epoch: int
    endpoint: str  # its request channel
    token_count: int
    compute_ms: float | None = None


class Submit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="submit"):
    """Work for a worker.

        token_ids | prompt                      | already emitted elsewhere |
                  0                 prompt_token_count           len(token_ids)

    A fresh request has nothing behind the prompt; a migrated or handed-over one has. `hand_over` asks for prefill only: the
    worker computes everything, samples one token, and answers with an offer of the blocks (finish reason `handed_over`), unless that
    token ended the request. An `EngineOffer` comes without a token where the other engine samples it. `offer` brings such blocks: the
    worker has them fetched, or computes the prompt itself if that fails or if it does not take this kind. `holder` names a worker that may
    be asked for blocks (`FindBlocks`), where nobody offers any.

    `for_role` is the role that the sender believes the worker to have. A worker that has changed its role since refuses what the new one
    does not take (`role_changed`), so that a sender's old view costs another try and nothing else. A sender that knows the role, and
    still sends what the role is not for, has nobody else: that is served.
    """

    request_id: str
    token_ids: list[int]
    prompt_token_count: int
    sampling: SamplingParams
    stop: StopConditions
    cache_salt: str | None = None
    grammar: Grammar | None = None
    lora: str | None = None  # name of the adapter, one of the card's; None: the model itself
    priority: int = 0  # lower is served first
    hand_over: bool = False
    with_parts: bool = False  # with `hand_over`: tell of the prompt's blocks while the rest of it is computed
    offer: Offer | None = None
    holder: KvHolder | None = None
    for_role: Role | None = None  # None: whatever the role is
    believed_prefill_tokens: int | None = None  # that wait at the worker, as whoever chose it believed; None: it is to take it anyway
    remaining_ms: int | None = None  # when it was sent: what is not done by then, nobody awaits any more. Not a time, since clocks differ


class Forward(msgspec.Struct, frozen=True, kw_only=True, tag="forward", omit_defaults=True):
    """A request that tokens cannot carry. Its body goes to the engine, and the engine's answer comes back in pieces (`Passed`).

    Not more than `window` bytes of the answer are on their way at a time: whoever reads them says so (`ReadOn`), and more follow. So a slow
    client fills neither this worker's memory nor a queue.
    """

    request_id: str
    kinds: list[str]  # of `RequestKind`; the first says which of the engine's paths it goes to
    body: bytes
    content_type: str
    model: str  # as the client calls it: so the answer is to call it
    lora: str | None = None  # name of the adapter that is meant, one of the card's
    model_span: tuple[int, int] | None = None  # where a body that is not JSON names the model
    headers: list[tuple[str, str]] = []  # of the client, those that may be carried
    wants_stream: bool
    window: int
    prompt_token_count: int  # a guess, for the load
    priority: int = 0  # lower is served first
    remaining_ms: int | None = None  # as in `Submit`


class ReadOn(msgspec.Struct, frozen=True, tag="read_on"):
    """So many bytes of a passed answer were read: as many more may come. Not answered."""

    request_id: str
    byte_count: int


class PullAhead(msgspec.Struct, frozen=True, tag="pull_ahead", omit_defaults=True):
    """Blocks of a request that will be handed over to this worker: take in what is new. Not answered; may be ignored.

    `token_ids` are those of the part's blocks. Parts come in order; the request's `Submit`, with the same id, comes last, if it comes.
    """

    request_id: str
    token_ids: list[int]
    part: KvPart
    cache_salt: str | None = None
    lora: str | None = None


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop a request and free what it holds, its lease included. Answered by a `SequenceOutput` with `cancelled` if it was alive."""

    request_id: str


class HandOver(msgspec.Struct, frozen=True, tag="hand_over"):
    """End a request here, after the step under way, so that it goes on elsewhere.

    Answered by its `handed_over` output, with an offer of all that is computed (or of what it brought along and nobody has read yet).
    A request whose prompt leg has begun leaves by itself when the prompt is computed; unknown ids have ended: neither is answered.
    """

    request_id: str


class ReleaseLease(msgspec.Struct, frozen=True, tag="release"):
    """The reader has its copy (or gave up); the blocks need not be kept for it."""

    lease_id: str


class Question(enum.StrEnum):
    CARD = "card"
    SNAPSHOT = "snapshot"  # a page of what the worker holds
    BATCHES = "batches"  # of the event stream, that were missed
    STATUS = "status"


class Query(msgspec.Struct, frozen=True, tag="query", omit_defaults=True):
    query_id: int
    question: Question
    cursor: str | None = None  # of a snapshot: the page, as the page before named it; None: the first
    after: int = 0  # of batches: those behind this sequence number


class FindBlocks(msgspec.Struct, frozen=True, tag="find_blocks"):
    """Where lie the blocks of a prefix, number `first_block` and following, as far as the worker has them cached?

    Answered by `HeldBlocks`; by `Denied` if this is another life of the worker, or nobody can read its blocks. The keys are cryptographic
    (`core.hashing.next_content_key`) and cover model, layout and tenant salt: what another tenant's prompt left there has other keys.
    """

    query_id: int
    epoch: int
    first_block: int
    keys: list[bytes]


class HeldBlocks(msgspec.Struct, frozen=True, tag="held"):
    """The first of the blocks asked for, perhaps none. No lease keeps them: those that are given away meanwhile have other generations."""

    part: KvPart


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Accept nothing new, finish what runs, then leave the registry and exit."""


class SwitchRole(msgspec.Struct, frozen=True, tag="switch_role"):
    """Take another role from now on. What runs goes on; frontends move what the new role is not for.

    Answered by `WorkerStatus` or `Denied`.
    """

    query_id: int
    role: Role


class SwitchSleep(msgspec.Struct, frozen=True, tag="switch_sleep"):
    """Fall asleep: accept nothing, let what runs move or end, then give the accelerator's memory free. Or wake.

    Answered by `WorkerStatus` once it is asleep or awake, or `Denied`.
    """

    query_id: int
    is_asleep: bool


ToWorker = Submit | Forward | ReadOn | PullAhead | Cancel | HandOver | ReleaseLease | SwitchRole | SwitchSleep | Query | FindBlocks | Drain


class FinishReason(enum.StrEnum):
    STOP = "stop"  # EOS, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the end of the context
    HANDED_OVER = "handed_over"  # prefill leg done, or moved away; the request goes on elsewhere
    CANCELLED = "cancelled"
    ERROR = "error"


class WireFailure(msgspec.Struct, frozen=True):
    """A `PolyphaseError` on its way to another process, by its class's `code`. With `overloaded` and `busier` comes the load of now."""

    code: str
    message: str
    is_retryable: bool
    load: Load | None = None


class TokenLogprob(msgspec.Struct, frozen=True):
    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # (token id, natural-log probability), most probable first


class PhaseStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the first token cost at this worker; sent once, with the first output of a request or, by engines that are servers, the last."""

    cached_token_count: int = 0  # prompt tokens found in the prefix cache
    transferred_token_count: int = 0
    transferred_bytes: int = 0
    transfer_ms: float = 0.0  # that the request waited for it; not what was pulled while the prompt was being computed elsewhere
    queue_ms: float = 0.0  # from arrival to the first step that computed something for it


class PassedUsage(msgspec.Struct, frozen=True):
    """As the engine counts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Passed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of an answer to a `Forward`. The first one has the status, and comes before or with the first bytes."""

    data: bytes = b""
    status: int = 0  # of HTTP; 0: as told before
    content_type: str = ""
    usage: PassedUsage | None = None  # with the end, if the engine told


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one request in one step. May carry no token when it only ends the request."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None  # one per new token
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that matched; None for EOS
    failure: WireFailure | None = None  # with finish reason `error`
    offer: Offer | None = None  # with finish reason `handed_over`
    part: KvPart | None = None  # while the prompt of a request `with_parts` is computed
    stats: PhaseStats | None = None
    passed: Passed | None = None  # of a request that was forwarded


class StepOutputs(msgspec.Struct, frozen=True, tag="outputs"):
    worker_id: str
    epoch: int
    step: int
    outputs: list[SequenceOutput]


class Denied(msgspec.Struct, frozen=True, tag="denied"):
    """What was asked will not be done."""

    message: str  # a sentence for a person


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """Reply to the query with this id."""

    query_id: int
    body: SnapshotPage | MissedBatches | ModelCard | WorkerStatus | HeldBlocks | Denied


FromWorker = StepOutputs | Answer
