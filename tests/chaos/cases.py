"""What is asked, and how answers compare.

Short and long prompts, of which several begin alike; greedy and with a seed; several choices, log-probabilities, penalties, chats, answers
that end by a stop string, and answers that follow a grammar where the deployment can do that.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "demo"
LOGPROB_TOLERANCE = 0.02  # the order of additions differs with the batch


@dataclass(frozen=True)
class Case:
    name: str
    path: str
    body: dict[str, Any]
    needs: str | None = None  # what not every engine can do; where it is refused, the case is left out


@dataclass
class Choice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def take(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or choice.get("message") or {}
        self.text += choice.get("text") or delta.get("content") or ""
        self.token_ids += choice.get("token_ids") or []
        logprobs = choice.get("logprobs") or {}
        self.logprobs += logprobs.get("token_logprobs") or [entry["logprob"] for entry in logprobs.get("content") or []]
        if choice.get("finish_reason"):
            self.finish_reasons.append(choice["finish_reason"])


@dataclass
class Answer:
    """All that a client got, however it came."""

    choices: dict[int, Choice] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    done_count: int = 0
    late_count: int = 0  # messages after the end
    request_id: str = ""

    def take(self, page: dict[str, Any]) -> None:
        if "error" in page:
            self.errors.append(page["error"])
        for choice in page.get("choices", ()):
            self.choices.setdefault(choice["index"], Choice()).take(choice)

    @property
    def token_count(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices.values())


def cases_of(seed: int, count: int = 24) -> list[Case]:
    rng = random.Random(seed)
    shared = [rng.randrange(300, 1300) for _ in range(160)]  # what several prompts begin with
    cases = []
    for number in range(count):
        length = rng.choice([4, 30, 70, 150, 300])
        prompt = [rng.randrange(300, 1300) for _ in range(length)]
        if number % 3 == 0:
            prompt = shared[: rng.randrange(16, 160)] + prompt[:20]
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": rng.choice([1, 8, 24, 48, 96]),
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        kind = number % 6
        if kind == 1:
            body |= {"n": 3, "temperature": 0.9, "seed": 100 + number, "top_p": 0.95}
        elif kind == 3:
            body |= {"logprobs": 2}
        elif kind == 4:
            body |= {"temperature": 0.7, "seed": number, "presence_penalty": 0.4, "n": 2, "logprobs": 1}
        elif kind == 2:
            body |= {"temperature": 1.1, "seed": number, "top_k": 40, "ignore_eos": False, "stop_token_ids": [prompt[0]]}
        path = "/v1/completions"
        if kind == 5:
            path, text = "/v1/chat/completions", " ".join(f"word{token}" for token in prompt[:40])
            del body["prompt"]
            body |= {"messages": [{"role": "user", "content": text}], "max_tokens": min(body["max_tokens"], 48)}
            if number % 4 == 1:
                body |= {"logprobs": True, "top_logprobs": 1}
        cases.append(Case(f"{number}", path, body))
    question = [{"role": "user", "content": "Name a colour and a number. " * 8}]
    for format_name, format_body in _FORMATS.items():
        body = {"model": MODEL, "messages": question, "max_tokens": 60, "temperature": 0, "return_token_ids": True}
        cases.append(Case(format_name, "/v1/chat/completions", body | {"response_format": format_body}, needs="structured output"))
    return cases


_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "number": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "number"],
    "additionalProperties": False,
}
_FORMATS: dict[str, dict[str, Any]] = {
    "json": {"type": "json_object"},
    "schema": {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": _SCHEMA}},
}


def with_stop_string(case: Case, answer: Answer) -> Case | None:
    """The same question, to be ended by something that its answer holds; None if there is nothing of the kind in it."""
    [choice, *others] = answer.choices.values()
    middle = len(choice.text) // 2
    stop = choice.text[middle : middle + 3]
    if others or case.needs or len(stop) < 3 or choice.text.index(stop) == 0:
        return None
    return Case(f"{case.name} until {stop!r}", case.path, {**case.body, "stop": [stop]})


async def ask(client: httpx.AsyncClient, case: Case, answer: Answer, *, stream: bool, leave_after: int | None = None) -> int:
    """Fills the answer, as far as it comes. `leave_after`: the client goes away when it has so many tokens. Returns: the status."""
    body = {**case.body, "stream": stream}
    if not stream:
        response = await client.post(case.path, json=body)
        answer.request_id = response.headers.get("x-request-id", "")
        answer.take(response.json())
        answer.done_count = 1
        return response.status_code
    async with client.stream("POST", case.path, json=body) as response:
        answer.request_id = response.headers.get("x-request-id", "")
        if response.status_code != 200:
            answer.take(json.loads(await response.aread()))
            return response.status_code
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                answer.done_count += 1
            elif line.startswith("data: "):
                answer.late_count += answer.done_count
                answer.take(json.loads(line[6:]))
            if leave_after is not None and answer.token_count >= leave_after:
                break
    return 200


def difference_so_far(expected: Answer, found: Answer) -> str | None:
    """Of an answer whose end the client did not see: whether what came can be the beginning of the right one."""
    if found.errors:
        return f"an error after it was accepted: {found.errors}"
    for index, choice in found.choices.items():
        wanted = expected.choices.get(index)
        if wanted is None:
            return f"choice {index} was not asked for"
        if choice.token_ids != wanted.token_ids[: len(choice.token_ids)] or not wanted.text.startswith(choice.text):
            return f"choice {index}: {choice} is no beginning of {wanted}"
        if choice.finish_reasons not in ([], wanted.finish_reasons):
            return f"choice {index}: terminal messages {choice.finish_reasons} instead of {wanted.finish_reasons}"
    return None


def difference(expected: Answer, found: Answer, case: Case) -> str | None:
    """In words; None if a client could not tell them apart."""
    if found.errors:
        return f"an error after it was accepted: {found.errors}"
    if found.done_count != 1 or found.late_count:
        return f"{found.done_count} ends of the stream, {found.late_count} messages after the first"
    count = case.body.get("n", 1)
    if sorted(found.choices) != list(range(count)):
        return f"choices {sorted(found.choices)} instead of {count}"
    for index, choice in found.choices.items():
        wanted = expected.choices[index]
        if len(choice.finish_reasons) != 1:
            return f"choice {index} has {len(choice.finish_reasons)} terminal messages: {choice.finish_reasons}"
        if choice.token_ids != wanted.token_ids:
            same = next((i for i, (a, b) in enumerate(zip(choice.token_ids, wanted.token_ids, strict=False)) if a != b), "the end")
            return f"choice {index}: other tokens from {same} on: {choice.token_ids} instead of {wanted.token_ids}"
        if (choice.text, choice.finish_reasons) != (wanted.text, wanted.finish_reasons):
            return f"choice {index}: {choice} instead of {wanted}"
        if len(choice.logprobs) != len(wanted.logprobs) or any(
            abs(a - b) > LOGPROB_TOLERANCE for a, b in zip(choice.logprobs, wanted.logprobs, strict=True)
        ):
            return f"choice {index}: other log-probabilities: {choice.logprobs} instead of {wanted.logprobs}"
    return None
