"""What is asked: short and long prompts, streams and whole answers, several choices, log-probabilities, seeds; and how answers compare."""

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
        path = "/v1/completions"
        if kind == 5:
            path, text = "/v1/chat/completions", " ".join(f"word{token}" for token in prompt[:40])
            del body["prompt"]
            body |= {"messages": [{"role": "user", "content": text}], "max_tokens": min(body["max_tokens"], 48)}
        cases.append(Case(f"{number}", path, body))
    return cases


async def ask(client: httpx.AsyncClient, case: Case, *, stream: bool, leave_after: int | None = None) -> tuple[int, Answer]:
    """Status and answer. `leave_after`: the client goes away when it has so many tokens."""
    answer = Answer()
    body = {**case.body, "stream": stream}
    if not stream:
        response = await client.post(case.path, json=body)
        answer.request_id = response.headers.get("x-request-id", "")
        answer.take(response.json())
        answer.done_count = 1
        return response.status_code, answer
    async with client.stream("POST", case.path, json=body) as response:
        answer.request_id = response.headers.get("x-request-id", "")
        if response.status_code != 200:
            answer.take(json.loads(await response.aread()))
            return response.status_code, answer
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                answer.done_count += 1
            elif line.startswith("data: "):
                answer.take(json.loads(line[6:]))
            if leave_after is not None and answer.token_count >= leave_after:
                break
    return 200, answer


def difference(expected: Answer, found: Answer, case: Case) -> str | None:
    """In words; None if a client could not tell them apart."""
    if found.errors:
        return f"an error after it was accepted: {found.errors}"
    if found.done_count != 1:
        return f"{found.done_count} ends of the stream"
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
