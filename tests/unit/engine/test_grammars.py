"""Structured output of the torch engine: what is allowed and nothing else, whatever else a request asks for, and wherever it began."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyphase.engines.batching.grammars import Grammars
from polyphase.engines.torch.engine import TorchEngine
from polyphase.testing.engines import stepping
from polyphase.text import GrammarMatcher, Tokenizer
from polyphase.wire.requests import FinishReason, Grammar, GrammarKind, SamplingParams, StopConditions, Submit
from tests.unit.engine.test_handover import Pair
from tests.unit.engine.tiny import Answers, assert_nothing_held, prompt_of, run_all, submit

MakeEngine = Callable[..., TorchEngine]
GREEDY = SamplingParams(seed=1, temperature=0.0)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def schema(value: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(value))


def regex(text: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, text)


def ask(name: str, grammar: Grammar | None, max_tokens: int = 300, **fields: Any) -> Submit:
    stop = fields.pop("stop", None) or StopConditions(max_tokens=max_tokens)
    return submit(name, fields.pop("prompt", prompt_of(9)), grammar=grammar, stop=stop, **{"sampling": GREEDY, **fields})


def text_of(engine: TorchEngine, tokens: list[int]) -> str:
    return Tokenizer.from_json(engine.card.tokenizer_json).decode(tokens)


def said(engine: TorchEngine, answers: Answers, name: str) -> str:
    return text_of(engine, answers.tokens(name))


@pytest.fixture
def engine(make_engine: MakeEngine) -> TorchEngine:
    return make_engine()


SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": SamplingParams(seed=3, temperature=1.0),
    "hot": SamplingParams(seed=3, temperature=2.0, top_k=3, top_p=0.5, min_p=0.1),
    "penalised": SamplingParams(seed=3, temperature=0.0, presence_penalty=2, frequency_penalty=2, repetition_penalty=1.5),
    "biased": SamplingParams(seed=3, temperature=0.7, logit_bias={5: 100.0, 94: -100.0}),
    "explained": SamplingParams(seed=3, temperature=0.0, top_logprobs=3),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_output_fits_whatever_is_asked_for_besides(engine: TorchEngine, sampling: SamplingParams) -> None:
    engine.submit(ask("a", schema(PERSON), sampling=sampling))
    engine.submit(ask("free", None, 20, stop=StopConditions(max_tokens=20, ignore_eos=True)))
    answers = run_all(engine)
    assert answers.reason("a") is FinishReason.STOP
    person = json.loads(said(engine, answers, "a"))
    assert set(person) == {"name", "age", "tags"}
    assert len(person["name"]) <= 8
    assert 0 <= person["age"] <= 150
    assert all(tag in ("a", "b", 3) for tag in person["tags"])
    logprobs = [one for output in answers.outputs["a"] for one in output.logprobs or []]
    assert [one.token_id for one in logprobs] == (answers.tokens("a") if sampling.top_logprobs else [])
    assert len(answers.tokens("free")) == 20
    assert_nothing_held(engine)


def test_a_free_request_beside_it_says_what_it_says_alone(engine: TorchEngine) -> None:
    free = ask("free", None, stop=StopConditions(max_tokens=20, ignore_eos=True))
    engine.submit(free)
    alone = run_all(engine).tokens("free")
    engine.submit(ask("a", regex("[xyz]{20}")))
    engine.submit(free)
    assert run_all(engine).tokens("free") == alone


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (regex("[0-9]{3}-[a-f]{2}"), r"[0-9]{3}-[a-f]{2}"),
        (Grammar(GrammarKind.CHOICE, '["yes", "no \\"really\\"", "größer 🙂"]'), r'yes|no "really"|größer 🙂'),
        (Grammar(GrammarKind.EBNF, 'root ::= "a" [0-9] "b"'), r"a[0-9]b"),
        (Grammar(GrammarKind.EBNF, 'start: "x" WORD\nWORD: /[k-m]{4}/'), r"x[k-m]{4}"),
    ],
    ids=["regex", "choice", "gbnf", "lark"],
)
def test_every_kind(engine: TorchEngine, grammar: Grammar, pattern: str) -> None:
    for seed in range(3):
        engine.submit(ask(f"a{seed}", grammar, sampling=SamplingParams(seed=seed, temperature=1.0)))
    answers = run_all(engine)
    for seed in range(3):
        assert re.fullmatch(pattern, said(engine, answers, f"a{seed}"))
        assert answers.reason(f"a{seed}") is FinishReason.STOP


def test_any_object(engine: TorchEngine) -> None:
    """A random model would hardly ever close it, so it is made to like the closing brace."""
    closing = {ord("}") - ord("!"): 60.0, ord('"') - ord("!"): 40.0}
    engine.submit(ask("a", Grammar(GrammarKind.JSON, ""), sampling=SamplingParams(seed=1, temperature=1.0, logit_bias=closing)))
    answers = run_all(engine)
    assert answers.reason("a") is FinishReason.STOP
    assert isinstance(json.loads(said(engine, answers, "a")), dict)


class TestEnds:
    def test_eos_comes_only_where_the_sentence_may_end(self, engine: TorchEngine) -> None:
        (eos,) = engine.card.eos_token_ids
        wants_to_end = SamplingParams(seed=1, temperature=0.0, logit_bias={eos: 1000.0})
        engine.submit(ask("a", regex("ab[cd]*"), sampling=wants_to_end))
        answers = run_all(engine)
        assert said(engine, answers, "a") == "ab"
        assert answers.tokens("a")[-1] == eos
        assert answers.reason("a") is FinishReason.STOP

    def test_it_ends_with_its_last_token_where_nothing_may_follow(self, engine: TorchEngine) -> None:
        engine.submit(ask("a", regex("ab"), stop=StopConditions(max_tokens=50, ignore_eos=True)))
        answers = run_all(engine)
        assert len(answers.tokens("a")) == 2
        assert answers.reason("a") is FinishReason.STOP

    def test_the_last_allowed_token_may_be_the_one_that_completes_it(self, engine: TorchEngine) -> None:
        engine.submit(ask("a", regex("abc"), 3))
        assert run_all(engine).reason("a") is FinishReason.STOP

    def test_max_tokens_cut_it(self, engine: TorchEngine) -> None:
        engine.submit(ask("a", regex("[ab]{20}"), 7))
        answers = run_all(engine)
        assert re.fullmatch("[ab]{7}", said(engine, answers, "a"))
        assert answers.reason("a") is FinishReason.LENGTH

    def test_min_tokens_hold_eos_back_until_nothing_else_fits(self, engine: TorchEngine) -> None:
        (eos,) = engine.card.eos_token_ids
        wants_to_end = SamplingParams(seed=1, temperature=0.0, logit_bias={eos: 1000.0})
        engine.submit(ask("a", regex("a{1,9}"), sampling=wants_to_end, stop=StopConditions(max_tokens=50, min_tokens=5)))
        engine.submit(ask("b", regex("a{1,3}"), sampling=wants_to_end, stop=StopConditions(max_tokens=50, min_tokens=40)))
        answers = run_all(engine)
        assert said(engine, answers, "a") == "aaaaa"
        assert said(engine, answers, "b") == "aaa"
        assert answers.reason("a") is answers.reason("b") is FinishReason.STOP

    def test_a_stop_string_ends_it_before(self, engine: TorchEngine) -> None:
        engine.submit(ask("a", regex("ab;cd"), stop=StopConditions(max_tokens=50, stop_strings=[";"])))
        answers = run_all(engine)
        assert said(engine, answers, "a") == "ab;"
        assert answers.end("a").stop_reason == ";"

    def test_a_grammar_of_nothing_ends_at_once(self, engine: TorchEngine) -> None:
        engine.submit(ask("a", regex("")))
        answers = run_all(engine)
        assert answers.tokens("a") == engine.card.eos_token_ids
        assert answers.reason("a") is FinishReason.STOP
        assert_nothing_held(engine)


class TestElsewhere:
    """What was emitted elsewhere is followed first; tokens stay the same."""

    @pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=8, temperature=1.2)], ids=["greedy", "seeded"])
    def test_it_goes_on_with_the_same_tokens_from_wherever_it_was(self, make_engine: MakeEngine, sampling: SamplingParams) -> None:
        first, second = make_engine(), make_engine()
        first.submit(ask("a", schema(PERSON), sampling=sampling))
        whole = run_all(first).tokens("a")
        for count in (1, 2, len(whole) // 2, len(whole) - 1):
            second.submit(ask(f"b{count}", schema(PERSON), sampling=sampling, emitted=whole[:count]))
        answers = run_all(second)
        for count in (1, 2, len(whole) // 2, len(whole) - 1):
            assert whole[:count] + answers.tokens(f"b{count}") == whole
            assert answers.reason(f"b{count}") is FinishReason.STOP

    def test_one_that_was_whole_only_ends(self, engine: TorchEngine) -> None:
        engine.submit(ask("a", regex("ab"), emitted=[64, 65]))
        answers = run_all(engine)
        assert (answers.tokens("a"), answers.reason("a")) == ([], FinishReason.STOP)

    def test_whitespace_of_another_kind_of_engine_is_let_be(self, engine: TorchEngine) -> None:
        emitted = Tokenizer.from_json(engine.card.tokenizer_json).encode('{  \r\r\t"a":')
        engine.submit(ask("a", schema({"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"]}), 3, emitted=emitted))
        answers = run_all(engine)
        assert answers.end("a").failure is None

    def test_what_does_not_fit_is_an_error(self, engine: TorchEngine) -> None:
        engine.submit(ask("a", regex("[0-9]+"), emitted=[64]))
        failure = run_all(engine).end("a").failure
        assert failure is not None
        assert (failure.code, failure.is_retryable) == ("invalid_value", False)
        assert "do not begin a sentence" in failure.message

    def test_the_first_token_of_a_prefill_worker_fits_as_well(self, make_engine: MakeEngine) -> None:
        alone = make_engine()
        prompt = prompt_of(70)
        alone.submit(ask("a", schema(PERSON), prompt=prompt))
        whole = run_all(alone).tokens("a")
        pair = Pair(make_engine(), make_engine())
        try:
            pair.prefill.submit(ask("a", schema(PERSON), prompt=prompt, hand_over=True))
            end = run_all(pair.prefill).end("a")
            assert (end.token_ids, end.finish_reason) == (whole[:1], FinishReason.HANDED_OVER)
            request = ask("a", schema(PERSON), prompt=prompt, emitted=whole[:1], offer=end.offer)
            pair.decode.submit(request, pair.source)
            answers = run_all(pair.decode)
            assert whole[:1] + answers.tokens("a") == whole
            assert answers.stats("a").transferred_token_count == len(prompt)
        finally:
            pair.close()

    def test_a_preempted_one_goes_on(self, make_engine: MakeEngine) -> None:
        roomy, narrow = make_engine(), make_engine(kv_bytes=12 * make_engine().card.block_bytes, context_length=128)
        grammar = regex("[a-z]{60}")
        for engine in (roomy, narrow):
            for i in range(4):
                engine.submit(ask(f"a{i}", grammar, prompt=prompt_of(20 + i)))
        expected, answers = run_all(roomy), run_all(narrow)
        assert narrow.load().preemptions_total > 0
        assert all(answers.tokens(f"a{i}") == expected.tokens(f"a{i}") for i in range(4))


class TestPreparation:
    async def test_others_do_not_wait_for_it(self, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        loop, may_go_on = asyncio.get_running_loop(), asyncio.Event()
        plain = Grammars._start

        def slow(self: Grammars, grammar: Grammar, emitted: list[int]) -> GrammarMatcher:
            asyncio.run_coroutine_threadsafe(may_go_on.wait(), loop).result(60)
            return plain(self, grammar, emitted)

        monkeypatch.setattr(Grammars, "_start", slow)
        async with stepping(engine) as run:
            engine.submit(ask("a", regex("abc")))
            engine.submit(ask("gone", regex("abc")))
            engine.submit(ask("free", None, 5))
            await run.end("free")
            assert not run.outputs("a")
            engine.abort("gone")
            assert (await run.end("gone")).finish_reason is FinishReason.CANCELLED
            may_go_on.set()
            assert (await run.end("a")).finish_reason is FinishReason.STOP
        assert text_of(engine, run.tokens("a")) == "abc"
        assert_nothing_held(engine)

    async def test_it_is_prepared_once(self, engine: TorchEngine) -> None:
        async with stepping(engine) as run:
            for name in ("a", "b"):
                engine.submit(ask(name, schema(PERSON)))
                await run.end(name)
        assert engine.core._grammars is not None
        assert len(engine.core._grammars._kept) == 1
        assert run.tokens("a") == run.tokens("b")

    @pytest.mark.parametrize(
        ("grammar", "said"),
        [
            (regex("(("), "unclosed group"),
            (schema({"type": "strange"}), "strange"),
            (schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
            (schema({"type": "object", "not": {}}), "not"),
            (Grammar(GrammarKind.EBNF, "root ::= nothing"), "nothing"),
        ],
    )
    async def test_what_cannot_be_prepared_ends_with_the_reason(self, engine: TorchEngine, grammar: Grammar, said: str) -> None:
        """A frontend would have refused it; whoever speaks with a worker directly is told as well."""
        async with stepping(engine) as run:
            engine.submit(ask("a", grammar))
            failure = (await run.end("a")).failure
        assert failure is not None
        assert said in failure.message
        assert failure.code == "invalid_value"
        assert_nothing_held(engine)


Checked = tuple[dict[str, Any], Callable[[Any], bool]]


def _plain() -> st.SearchStrategy[Checked]:
    values = st.lists(st.one_of(st.integers(-99, 99), st.text('abcÄ"\\ \n', max_size=4), st.booleans(), st.none()), min_size=1, max_size=3)
    bounds = st.tuples(st.integers(-50, 50), st.integers(0, 100))
    return st.one_of(
        values.map(lambda some: ({"enum": some}, lambda found: any(type(found) is type(one) and found == one for one in some))),
        bounds.map(lambda b: ({"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}, lambda found: b[0] <= found <= b[0] + b[1])),
        st.integers(0, 5).map(lambda n: ({"type": "string", "maxLength": n}, lambda found: isinstance(found, str) and len(found) <= n)),
        st.just(({"type": ["boolean", "null"]}, lambda found: found is None or isinstance(found, bool))),
    )


def _nested(inner: st.SearchStrategy[Checked]) -> st.SearchStrategy[Checked]:
    lists = st.tuples(inner, st.integers(0, 3)).map(
        lambda made: (
            {"type": "array", "items": made[0][0], "maxItems": made[1]},
            lambda found: len(found) <= made[1] and all(map(made[0][1], found)),
        )
    )
    objects = st.dictionaries(st.text('ab_ "é', min_size=1, max_size=3), inner, min_size=1, max_size=3).map(
        lambda made: (
            {
                "type": "object",
                "properties": {name: one[0] for name, one in made.items()},
                "required": sorted(made),
                "additionalProperties": False,
            },
            lambda found: set(found) == set(made) and all(one[1](found[name]) for name, one in made.items()),
        )
    )
    return st.one_of(lists, objects)


@given(made=st.recursive(_plain(), _nested, max_leaves=5), seed=st.integers(0, 2**32), temperature=st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_schemas(engine: TorchEngine, made: Checked, seed: int, temperature: float) -> None:
    wanted, fits = made
    # A random model likes spaces no less than anything else, and they are free between the parts.
    spaces = {token: -50.0 for token in range(256) if text_of(engine, [token]).isspace()}
    sampling = SamplingParams(seed=seed, temperature=temperature, logit_bias=spaces)
    engine.submit(ask("a", schema(wanted), 600, sampling=sampling))
    answers = run_all(engine)
    assert answers.end("a").failure is None
    if answers.reason("a") is FinishReason.STOP:
        assert fits(json.loads(said(engine, answers, "a")))
    else:
        assert len(answers.tokens("a")) == 600
