"""AIConfigurator's measured operator tables, if that package is installed (`pip install 'polyphase[advisor]'`).

It is asked through `cli_estimate` of its Python interface (0.12), for the engine that decodes, with the newest tables that it has of the
engine; what it has no table for it derives from similar ones (its HYBRID mode).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from polyphase.advisor.estimate import Question
from polyphase.advisor.second_opinion import NoAnswer
from polyphase.core.errors import ConfigurationError

_SYSTEMS = {
    "a100": "a100_sxm",
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "b300": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "l40s": "l40s",
}
_FORMATS = {"fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4", "int4_wo": "int4_wo", "bf16": "bfloat16", "mxfp4": "w4a16_mxfp4"}


class AIConfiguratorTables:
    """Implements `second_opinion.OperatorTables`. The first question about an accelerator takes some ten seconds."""

    def __init__(self, model: str, ask: Callable[..., Any] | None = None) -> None:
        """`model`: its name on the hub, by which the package knows its configuration.

        Raises: ConfigurationError if the package is not installed.
        """
        self._model = model
        self._ask = ask or _installed()

    def itl_ms(self, question: Question) -> float:
        with _quiet():
            try:
                found = self._ask(self._model, **arguments_of(question))
            except NoAnswer:
                raise
            except Exception as error:  # whatever it raises means that it has no answer
                raise NoAnswer(f"{type(error).__name__}: {error}"[:200]) from error
        itl = float(found.tpot)
        if not itl > 0:
            raise NoAnswer(f"it says {itl} ms")
        return itl


def arguments_of(question: Question) -> Mapping[str, Any]:
    """For `cli_estimate`, of one engine. Raises: NoAnswer if the package has no name for something."""
    q, setting, m = question, question.setting, question.mapping
    system = _SYSTEMS.get(setting.accelerator.name)
    if system is None:
        raise NoAnswer(f"it has no tables of {setting.accelerator.name}")
    batch = max(1, round(q.concurrency / (q.worker_count * m.dp)))
    shared = {"tp_size": m.tp, "pp_size": m.pp, "attention_dp_size": m.dp}
    if setting.shape.experts is not None:
        shared |= {"moe_tp_size": m.moe_tp, "moe_ep_size": m.moe_ep}
    arguments: dict[str, Any] = {
        "system_name": system,
        "backend_name": setting.backend,
        "database_mode": "HYBRID",
        "isl": round(q.traffic.isl),
        "osl": round(q.traffic.osl),
        "prefix": round(q.traffic.cached_tokens),
        "gemm_quant_mode": _FORMATS[setting.precision.gemm.name],
        **shared,
    }
    if setting.shape.experts is not None:
        arguments["moe_quant_mode"] = _FORMATS[setting.precision.experts.name]
    if q.prefill_mapping is None:
        return arguments | {"batch_size": batch}
    # An engine that only decodes is asked for by itself: how it is rate-matched is ours to say.
    return arguments | {"mode": "static_gen", "batch_size": batch}


def _installed() -> Callable[..., Any]:
    try:
        from aiconfigurator.cli.api import cli_estimate  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ConfigurationError(
            "operator tables come with the package aiconfigurator (850 MB), which is not installed: pip install 'polyphase[advisor]'"
        ) from None
    return cli_estimate  # type: ignore[no-any-return,unused-ignore]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its warnings are about its own tables."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
