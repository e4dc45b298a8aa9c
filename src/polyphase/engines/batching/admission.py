"""Checks a request before the engine takes it."""

from __future__ import annotations

from polyphase.core.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from polyphase.wire.cards import ModelCard
from polyphase.wire.requests import Submit


def check_request(request: Submit, card: ModelCard) -> None:
    """Raises: RequestError if the request can never run here. Ranges of sampling parameters are the frontend's to check."""
    check_lengths(request, card)
    check_grammar(request, card)
    if min(request.token_ids) < 0 or max(request.token_ids) >= card.vocab_size:
        raise InvalidRequest(f"token ids must be from 0 to {card.vocab_size - 1}", param="token_ids", request_id=request.request_id)
    bias = request.sampling.logit_bias
    if bias and (min(bias) < 0 or max(bias) >= card.vocab_size):
        raise InvalidRequest(
            f"logit_bias names a token that does not exist: ids are from 0 to {card.vocab_size - 1}",
            param="logit_bias",
            request_id=request.request_id,
        )
    if request.lora is not None and request.lora not in card.adapters:
        raise ModelNotFound(f"this worker has no LoRA adapter {request.lora!r}", param="model", request_id=request.request_id)
    if any(not stop for stop in request.stop.stop_strings):
        raise InvalidRequest("a stop string cannot be empty", param="stop", request_id=request.request_id)


def check_grammar(request: Submit, card: ModelCard) -> None:
    """Raises: RequestError if the engine cannot keep to the request's grammar, or not from where it is to go on."""
    if request.grammar is None:
        return
    if not card.takes_grammars:
        raise InvalidRequest("this engine has no structured output", param="grammar", request_id=request.request_id)
    emitted_count = len(request.token_ids) - request.prompt_token_count
    if emitted_count and not card.resumes_grammars:
        raise InvalidRequest(
            f"structured output of which {emitted_count} tokens were emitted elsewhere cannot go on at this engine ({card.engine})",
            param="grammar",
            request_id=request.request_id,
        )


def check_lengths(request: Submit, card: ModelCard) -> None:
    """The part that does not read the tokens. Raises: RequestError."""
    prompt_count, known_count = request.prompt_token_count, len(request.token_ids)
    if not 1 <= prompt_count <= known_count:
        raise InvalidRequest(
            f"prompt_token_count is {prompt_count}, but there are {known_count} tokens and a prompt has at least one",
            param="prompt_token_count",
            request_id=request.request_id,
        )
    if prompt_count >= card.context_length:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_count} tokens and the model's context is {card.context_length}: no room is left for an answer",
            request_id=request.request_id,
        )
    if known_count > card.context_length:
        raise ContextLengthExceeded(
            f"prompt and output have {known_count} tokens together; the model's context is {card.context_length}",
            request_id=request.request_id,
        )
    if request.stop.max_tokens < 1:
        raise InvalidRequest(
            f"max_tokens must be at least 1, not {request.stop.max_tokens}", param="max_tokens", request_id=request.request_id
        )
