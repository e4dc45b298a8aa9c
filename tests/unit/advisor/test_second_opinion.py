"""Operator tables as a second opinion: how they are asked, and what follows from their answer. The package itself is not needed."""

from __future__ import annotations

import importlib.util
from math import exp, log
from types import SimpleNamespace
from typing import Any

import pytest

from polyphase.advisor.deployment import Serving, Setting, Traffic
from polyphase.advisor.estimate import Figure, Question
from polyphase.advisor.mapping import ParallelMapping
from polyphase.advisor.operator_tables import AIConfiguratorTables, arguments_of
from polyphase.advisor.precision import parse_precision
from polyphase.advisor.second_opinion import NoAnswer, taken_together
from polyphase.core.errors import ConfigurationError

from .building import LIBRARY

TRAFFIC = Traffic(4000, 500, cached_tokens=1000)


def question(accelerator: str = "h200", *, is_split: bool = False) -> Question:
    serving = Serving.DISAGGREGATED if is_split else Serving.AGGREGATED
    setting = Setting(
        LIBRARY.model("deepseek-v3"), LIBRARY.accelerator(accelerator), parse_precision("fp8_block"), "sglang", serving=serving
    )
    mapping = ParallelMapping(4, 1, 2, 1, 8)
    apart = {"prefill_mapping": ParallelMapping(8, 1, 1, 1, 8), "prefill_worker_count": 3} if is_split else {}
    return Question(setting, mapping, 256, TRAFFIC, worker_count=2, **apart)  # type: ignore[arg-type]


def figure(value: float, share: float) -> Figure:
    return Figure(value, value / (1 + share), value * (1 + share), 0.1)


def test_the_engine_that_decodes_is_asked_for() -> None:
    whole = arguments_of(question())
    assert (whole["system_name"], whole["backend_name"], whole["batch_size"]) == ("h200_sxm", "sglang", 64)
    assert (whole["isl"], whole["osl"], whole["prefix"]) == (4000, 500, 1000)
    assert (whole["tp_size"], whole["attention_dp_size"], whole["moe_ep_size"], whole["gemm_quant_mode"]) == (4, 2, 8, "fp8_block")
    assert "mode" not in whole
    assert arguments_of(question(is_split=True))["mode"] == "static_gen"


def test_what_the_tables_do_not_hold_is_no_answer() -> None:
    with pytest.raises(NoAnswer, match="no tables of mi300x"):
        arguments_of(question("mi300x"))

    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("OOM")

    with pytest.raises(NoAnswer, match="RuntimeError: OOM"):
        AIConfiguratorTables("a/model", refuses).itl_ms(question())
    with pytest.raises(NoAnswer, match="says 0"):
        AIConfiguratorTables("a/model", lambda *_, **__: SimpleNamespace(tpot=0.0)).itl_ms(question())
    assert AIConfiguratorTables("a/model", lambda name, **_: SimpleNamespace(tpot=len(name))).itl_ms(question()) == 7


def test_without_the_package_it_is_said_what_to_install() -> None:
    if importlib.util.find_spec("aiconfigurator") is None:
        with pytest.raises(ConfigurationError, match=r"polyphase\[advisor\]"):
            AIConfiguratorTables("a/model")


def test_the_surer_one_weighs_more() -> None:
    sure, unsure = figure(10, 0.1), figure(10, 1.0)
    assert 10 < taken_together(sure, 14).together.value < 11
    assert 12 < taken_together(unsure, 14).together.value < 14
    agreed = taken_together(unsure, 10).together
    assert agreed.value == pytest.approx(10)
    assert agreed.high < unsure.high, "two that agree are surer than one"


def test_a_contradiction_widens_the_interval() -> None:
    own = figure(10, 0.3)
    apart = taken_together(own, 40)
    assert apart.contradicts(own)
    assert log(apart.together.high / apart.together.value) > log(1.3)
    assert not taken_together(own, 12).contradicts(own)
    half = apart.together.high / apart.together.value
    assert apart.together.low == pytest.approx(apart.together.value / half)
    assert exp(1.2816 * apart.together.deviation) == pytest.approx(half)
