"""What structured output costs.

    mask_us_per_token   CPU time to say which tokens may come next, and to follow the one that came
    compile_ms          CPU time to prepare the schema for the model's vocabulary, nothing kept
    itl_added_pct       CPU time per output token of the whole engine, with the grammar against without, both sampled greedily

The schema is an order with items, of the size of what applications ask for. The engine is stepped by hand, at a batch of 1 and of 8, with
and without the grammar turn by turn; both runs of a pair have equally many tokens. The mask's share does not depend on the model: with the
demo model a step takes a few ms, so the percentage is an upper bound for larger ones.

    python benchmarks/structured.py [--model models/demo] [--json]
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

from harness import Figure, arguments, report
from polyphase.engines.torch import TorchSettings, load_torch_engine
from polyphase.engines.torch.engine import TorchEngine
from polyphase.text import GrammarVocabulary, Tokenizer
from polyphase.wire.requests import Grammar, GrammarKind, SamplingParams, StopConditions, Submit

REPOSITORY = Path(__file__).resolve().parent.parent
ROUNDS = 7
BATCHES = (1, 8)
TOKENS = 200
SCHEMA = {
    "type": "object",
    "properties": {
        "order": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{6}$"},
        "customer": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "email": {"type": "string", "format": "email"}, "age": {"type": "integer"}},
            "required": ["name", "email"],
            "additionalProperties": False,
        },
        "items": {
            "type": "array",
            "minItems": 50,  # so that no output ends before its last token
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 1, "maxLength": 60},
                    "count": {"type": "integer", "minimum": 1, "maximum": 99},
                    "price": {"type": "number"},
                    "state": {"enum": ["new", "paid", "sent", "returned"]},
                },
                "required": ["name", "count", "price", "state"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["order", "customer", "items"],
    "additionalProperties": False,
}
EXAMPLE = {
    "order": "ABC-123456",
    "customer": {"name": "Ada Lovelace", "email": "ada@example.org", "age": 36},
    "items": [{"name": f"engine part {i}", "count": i % 9 + 1, "price": 1.5 * i, "state": "paid"} for i in range(60)],
}
GRAMMAR = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))


def compile_ms(vocabulary: GrammarVocabulary) -> float:
    taken = []
    for _ in range(ROUNDS):
        began = time.process_time()
        vocabulary.start(GRAMMAR)
        taken.append(time.process_time() - began)
    return statistics.median(taken) * 1e3


def mask_us_per_token(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> float:
    """Over an output that fits; the first round, in which the library learns the grammar's states, does not count."""
    tokens = tokenizer.encode(json.dumps(EXAMPLE))
    first = vocabulary.start(GRAMMAR)
    taken = []
    for _ in range(ROUNDS + 1):
        matcher = first.copy()
        began = time.process_time()
        for token in tokens:
            allowed = matcher.allowed()
            assert allowed[token]
            assert matcher.accept([token])
        taken.append((time.process_time() - began) / len(tokens))
    return statistics.median(taken[1:]) * 1e6


def cpu_ms_per_token(engine: TorchEngine, name: str, batch: int, grammar: Grammar | None) -> float:
    stop = StopConditions(max_tokens=TOKENS, ignore_eos=grammar is None)
    for i in range(batch):
        prompt = [300 + i, *range(400, 432)]
        engine.submit(
            Submit(
                request_id=f"{name}-{i}",
                token_ids=prompt,
                prompt_token_count=len(prompt),
                sampling=SamplingParams(seed=1, temperature=0.0),
                stop=stop,
                grammar=grammar,
            )
        )
    began, count = time.process_time(), 0
    while engine.core.has_requests:
        found = engine.step()
        count += sum(len(output.token_ids) for output in found.outputs) if found is not None else 0
    assert count == batch * TOKENS, f"{count} tokens instead of {batch * TOKENS}"
    return (time.process_time() - began) / count * 1e3


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default=str(REPOSITORY / "models" / "demo"))
    options = parser.parse_args()
    engine = load_torch_engine(TorchSettings(model=options.model, thread_count=1, device="cpu"))
    try:
        tokenizer = Tokenizer.from_json(engine.card.tokenizer_json)
        vocabulary = GrammarVocabulary(tokenizer, engine.card.vocab_size, engine.card.eos_token_ids)
        figures = {
            "mask_us_per_token": Figure(mask_us_per_token(vocabulary, tokenizer), "us"),
            "compile_ms": Figure(compile_ms(vocabulary), "ms"),
        }
        for batch in BATCHES:
            pairs: list[tuple[float, float]] = []
            for i in range(ROUNDS + 1):
                free = cpu_ms_per_token(engine, f"free{batch}-{i}", batch, None)
                pairs.append((free, cpu_ms_per_token(engine, f"bound{batch}-{i}", batch, GRAMMAR)))
            added = statistics.median((bound / free - 1) * 100 for free, bound in pairs[1:])
            figures["itl_added_pct" if batch == 1 else f"itl_added_pct_c{batch}"] = Figure(added, "%")
    finally:
        engine.close()
    report("structured", figures, as_json=options.json)


if __name__ == "__main__":
    main()
