"""The command line, the options file and the environment of `trtllm-serve`, and settings that contradict each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from polyphase.config import ServeSettings
from polyphase.core.errors import ConfigurationError, ModelLoadError
from polyphase.engines.served.settings import ServerSettings
from polyphase.engines.trtllm.assembly import load_trtllm_engine
from polyphase.engines.trtllm.flags import environment, options, progress_of, serve_command
from polyphase.launch.plan import plan_deployment
from polyphase.wire.cards import Role
from tests.unit.trtllm.double import write_model
from tests.unit.trtllm.player import read_options


def settings(**changes: Any) -> ServerSettings:
    return ServerSettings(**{"model": "/models/m", "name": "m", "folder": Path("/run/w"), "command": "trtllm-serve", **changes})


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_what_is_said_becomes_flags() -> None:
    given = settings(context_length=4096, max_batch_tokens=2048, max_running=8, arguments="--tp_size 2")
    command = serve_command(given, 1234)
    assert command[:2] == ["trtllm-serve", "/models/m"]
    assert (value_of(command, "--host"), value_of(command, "--port")) == ("127.0.0.1", "1234")
    assert (value_of(command, "--max_seq_len"), value_of(command, "--max_num_tokens"), value_of(command, "--max_batch_size")) == (
        "4096",
        "2048",
        "8",
    )
    assert value_of(command, "--extra_llm_api_options") == "/run/w/trtllm.yaml"
    assert command[-2:] == ["--tp_size", "2"], "last, so that they win"
    assert "--max_seq_len" not in serve_command(settings(), 1)


def test_the_options_turn_on_what_routing_needs() -> None:
    plain = read_options(options(settings(), None))
    assert plain["enable_iter_perf_stats"] == plain["kv_cache_config.enable_block_reuse"] == "true"
    assert int(plain["kv_cache_config.event_buffer_max_size"]) > 0
    assert not plain.keys() & {"dtype", "kv_cache_config.tokens_per_block", "kv_cache_config.max_tokens", "cache_transceiver_config"}
    told = read_options(options(settings(block_size=64, dtype="float16"), 8192))
    assert (told["kv_cache_config.tokens_per_block"], told["kv_cache_config.max_tokens"], told["dtype"]) == ("64", "8192", "float16")


@pytest.mark.parametrize(("role", "overlaps"), [(Role.PREFILL, False), (Role.DECODE, True)])
def test_servers_of_one_phase_have_a_transceiver(role: Role, overlaps: bool) -> None:
    found = read_options(options(settings(role=role), None))
    assert found["cache_transceiver_config.backend"] == "DEFAULT"
    assert ("disable_overlap_scheduler" not in found) is overlaps


def test_the_users_environment_stays() -> None:
    assert environment({}) == {"PYTHONUNBUFFERED": "1"}
    assert environment({"PYTHONUNBUFFERED": "0"}) == {}


def test_progress_is_a_phrase() -> None:
    assert progress_of([]) == "it starts Python and imports torch"
    assert progress_of(["Loading weights: 10%", "something else"]) == "it loads the weights"


def test_without_tensorrt_llm_it_is_said_how_to_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigurationError, match="--engine-python"):
        serve_command(settings(command=None), 1)
    with pytest.raises(ConfigurationError, match=r"no trtllm-serve beside --engine-python /no/python"):
        serve_command(settings(command=None, python="/no/python"), 1)
    with pytest.raises(ConfigurationError, match="as a shell would"):
        serve_command(settings(arguments="'open"), 1)


def test_a_start_that_fails_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    write_model(tmp_path)
    broken = f"{sys.executable} -c 'raise OSError(28)'"
    with pytest.raises(ModelLoadError, match=r"trtllm ended \(exit code 1\): OSError: 28"):
        load_trtllm_engine(settings(model=str(tmp_path), command=broken, folder=tmp_path / "w"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prefill": 1, "decode": 1, "workers": 1}, "cannot be combined"),
        ({"attach": "http://x:1", "prefill": 1, "decode": 1}, "together be as many"),
        ({"attach": "http://x:1", "engine_command": "trtllm-serve"}, "runs already"),
        ({"lora": {"sql": "/a"}}, "trtllm serves no LoRA adapters"),
        ({"engine_api_key_env": "KEY"}, "POLYPHASE_ENGINE_API_KEY"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServeSettings(model="demo", engine="trtllm", **changes)


def test_servers_that_run_already_can_have_a_phase_each() -> None:
    given = ServeSettings(model="demo", engine="trtllm", attach="http://x:1,http://x:2", prefill=1, decode=1)  # type: ignore[arg-type]
    workers = plan_deployment(given, cores=2, gpus=()).workers
    assert [(worker.role, worker.attach) for worker in workers] == [(Role.PREFILL, "http://x:1"), (Role.DECODE, "http://x:2")]
