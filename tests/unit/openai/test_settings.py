"""What `polyphase serve --engine openai` is told, from flags to the command of its workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polyphase.config import load_serve_settings
from polyphase.core.errors import ConfigurationError
from polyphase.launch import plan_deployment
from polyphase.launch.plan import process_specs
from polyphase.worker.options import parse_options

KEY = "gsk_0123456789abcdef"
URLS = "http://127.0.0.1:8080,https://example.org/api/v1"


def plan_of(environment: dict[str, str] | None = None, **flags: Any) -> Any:
    given = {"model": "accounts/acme/models/large:7b", "engine": "openai", "attach": URLS, **flags}
    return plan_deployment(load_serve_settings(given, environment or {}), cores=2, gpus=())


def test_a_worker_for_each_address_and_the_key_by_its_variable() -> None:
    plan = plan_of({"A_KEY": KEY}, engine_api_key_env="A_KEY", served_model_name="large")
    specs = process_specs(plan, Path("/tmp/run"))
    assert len(specs) == 3
    options = [parse_options(spec.arguments[3:]) for spec in specs[1:]]
    assert [one.engine_options.attach for one in options] == URLS.split(",")
    assert {(one.engine_options.model, one.engine_options.name) for one in options} == {("accounts/acme/models/large:7b", "large")}
    assert {one.engine_options.engine_api_key_env for one in options} == {"A_KEY"}
    assert not any(KEY in word for spec in specs for word in (*spec.arguments, *spec.environment.values()))


def test_the_model_is_called_as_the_server_does_unless_told() -> None:
    specs = process_specs(plan_of(), Path("/tmp/run"))
    assert parse_options(specs[1].arguments[3:]).engine_options.name == "accounts/acme/models/large:7b"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"attach": None}, "is a server that runs already; name its address"),
        ({"prefill": 1, "decode": 1, "attach": None}, "name its address"),
        ({"engine_api_key_env": KEY}, "names an environment variable that is not set"),
        ({"engine_api_key_env": "sk-" + KEY}, "names an environment variable that is not set"),
        ({"engine": "vllm", "engine_api_key_env": "A_KEY"}, "is for --engine openai"),
        ({"workers": 2}, "attach makes a worker for each address"),
    ],
)
def test_what_cannot_be(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as raised:
        plan_of({"A_KEY": "k"}, **flags)
    assert KEY not in str(raised.value)
