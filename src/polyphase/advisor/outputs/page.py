"""The page with the interactive chart: one HTML file that needs no network. Its script is in data/page.html; the answers are put in as
JSON.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from polyphase.advisor.advice import Advice, reasons
from polyphase.advisor.outputs.launch_files import engine_commands
from polyphase.advisor.outputs.records import advice_record, record_of


@cache
def _template() -> str:
    return (files("polyphase.advisor") / "data" / "page.html").read_text()


def as_page(answers: Sequence[Advice], model_location: str) -> str:
    """`answers`: of one model on several fleets, shown side by side."""
    title = f"{answers[0].inquiry.shape.name} on {', '.join(str(answer.inquiry.fleet) for answer in answers)}"
    content = json.dumps([_series(answer, model_location) for answer in answers])
    # A script element ends at the first `</`, whatever it stands in.
    return _template().replace("@TITLE@", html.escape(title)).replace("@DATA@", content.replace("</", "<\\/"))


def _series(answer: Advice, model_location: str) -> dict[str, Any]:
    record = advice_record(answer)
    record["frontier"] = [
        record_of(option) | {"launch": engine_commands(option, model_location, answer.inquiry.traffic)} for option in answer.frontier
    ]
    record["best"] = [record_of(option) | {"reasons": reasons(option, answer)} for option in answer.best]
    goal = answer.inquiry.goal
    record["goal"] = {"ttft_ms": goal.ttft_ms, "itl_ms": goal.longest_itl_ms, "latency_ms": goal.latency_ms}
    return record
