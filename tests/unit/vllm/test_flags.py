"""The command line of `vllm serve`, what is left away for versions that do not know it, and what a start says of itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from polyphase.config import ServeSettings
from polyphase.core.errors import ConfigurationError, ModelLoadError
from polyphase.engines.served.model_files import read_model_facts
from polyphase.engines.vllm import VllmSettings
from polyphase.engines.vllm.assembly import load_vllm_engines
from polyphase.engines.vllm.dialects import CompletionsDialect, GenerateDialect
from polyphase.engines.vllm.flags import environment, host_kv_bytes, progress_of, serve_command, unusable_flags
from polyphase.engines.vllm.metrics import cache_of, gauges_of
from polyphase.engines.vllm.probe import adapters_of
from polyphase.launch.model_source import resolve_model
from polyphase.launch.plan import plan_deployment, process_specs
from polyphase.wire.requests import SamplingParams, StopConditions, Submit
from tests.unit.vllm.double import Recording

DEMO = resolve_model("demo").location


def settings(**changes: Any) -> VllmSettings:
    return VllmSettings(**{"model": "/models/m", "name": "m", "folder": Path("/run/w"), "command": "vllm serve", **changes})


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_what_is_said_becomes_flags() -> None:
    command = serve_command(settings(block_size=32, kv_bytes=1 << 30, context_length=4096, arguments="--tensor-parallel-size 2"), "m", 1234)
    assert command[:3] == ["vllm", "serve", "/models/m"]
    assert (value_of(command, "--host"), value_of(command, "--port")) == ("127.0.0.1", "1234")
    assert (value_of(command, "--block-size"), value_of(command, "--max-model-len")) == ("32", "4096")
    assert value_of(command, "--kv-cache-memory-bytes") == str(1 << 30)
    assert "ipc:///run/w/events" in value_of(command, "--kv-events-config")
    assert command[-2:] == ["--tensor-parallel-size", "2"], "last, so that they win"
    assert "--dtype" not in command


def test_a_cache_of_a_given_size_does_not_want_the_accelerator_for_itself() -> None:
    assert float(value_of(serve_command(settings(kv_bytes=1 << 30), "m", 1), "--gpu-memory-utilization")) < 0.1
    theirs = serve_command(settings(kv_bytes=1 << 30, arguments="--gpu-memory-utilization=0.4"), "m", 1)
    assert [part for part in theirs if "utilization" in part] == ["--gpu-memory-utilization=0.4"]
    assert "--gpu-memory-utilization" not in serve_command(settings(), "m", 1), "vLLM's choice, on an accelerator of its own"


@pytest.mark.parametrize(
    ("changes", "inherited", "wanted"),
    [
        ({}, {}, 16 * 1000),
        ({"kv_bytes": 5}, {}, 5),
        ({"device": "cuda"}, {}, None),
        ({"arguments": "--gpu-memory-utilization 0.3"}, {}, None),
        ({"arguments": "--kv-cache-memory-bytes=77"}, {}, None),
        ({}, {"VLLM_CPU_KVCACHE_SPACE": "4"}, None),
    ],
)
def test_in_host_memory_there_is_room_for_others(changes: dict[str, Any], inherited: dict[str, str], wanted: int | None) -> None:
    given = settings(**{"device": "cpu", **changes})
    assert host_kv_bytes(given, 1000, 1 << 30, inherited) == wanted
    if wanted == 16 * 1000:
        assert host_kv_bytes(given, 0, 1 << 30, inherited) == host_kv_bytes(given, 1 << 30, 1 << 30, inherited) == int(0.2 * (1 << 30))


def test_flags_that_a_version_does_not_know_are_left_away() -> None:
    said = ["usage: vllm serve …", "vllm: error: unrecognized arguments: --enable-scale-out --their-own=1"]
    unknown = unusable_flags(said)
    assert unknown == {"--enable-scale-out"}
    assert "--enable-scale-out" not in serve_command(settings(), "m", 1, unknown)


def test_the_users_environment_stays() -> None:
    assert "VLLM_HOST_IP" not in environment(settings(), {"VLLM_HOST_IP": "10.0.0.1"})
    assert environment(settings(device="cpu"), {})["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_progress_is_a_phrase() -> None:
    assert progress_of([]) == "it starts Python and imports torch"
    assert progress_of(["Resolved architecture: X", "Starting to load model /m...", "something else"]) == "it loads the model"


def test_without_vllm_it_is_said_how_to_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigurationError, match="--engine-python"):
        serve_command(settings(command=None), "m", 1)
    with pytest.raises(ConfigurationError, match="is no program"):
        serve_command(settings(command=None, python="/no/python"), "m", 1)


def test_metrics_of_the_real_one() -> None:
    text = Recording().pages["/metrics"]
    assert cache_of(text) == (32, 2048)
    gauges = gauges_of(text)
    assert gauges.iterations > 100
    assert (gauges.running_count, gauges.waiting_count) == (0, 0)
    assert cache_of("") == (0, 0)


def test_a_start_that_fails_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    broken = f"{sys.executable} -c 'raise OSError(28)'"
    with pytest.raises(ModelLoadError, match=r"vllm ended \(exit code 1\): OSError: 28"):
        load_vllm_engines(settings(model=DEMO, command=broken, folder=tmp_path / "w"))


def test_an_address_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is no address of a server"):
        load_vllm_engines(settings(model=DEMO, attach="localhost", folder=tmp_path))


def test_the_card_is_read_without_torch() -> None:
    facts = read_model_facts(DEMO)
    assert facts.eos_token_ids
    assert facts.context_length
    assert facts.kv_bytes_per_token > 0
    assert facts.text.chat_template
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        read_model_facts("/tmp")


def test_a_worker_for_each_address() -> None:
    given = ServeSettings(model="demo", engine="vllm", attach="http://127.0.0.1:1,http://127.0.0.1:2")  # type: ignore[arg-type]
    specs = process_specs(plan_deployment(given, cores=2, gpus=()), Path("/run/x"))
    assert [value_of(list(spec.arguments), "--attach") for spec in specs[1:]] == ["http://127.0.0.1:1", "http://127.0.0.1:2"]


def test_flags_with_dashes_arrive_in_one_piece() -> None:
    given = ServeSettings(model="demo", engine="vllm", engine_args="--enforce-eager --seed 1")
    specs = process_specs(plan_deployment(given, cores=2, gpus=()), Path("/run/x"))
    assert "--engine-args=--enforce-eager --seed 1" in specs[1].arguments


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "torch", "attach": "http://x:1"}, "servers of their own"),
        ({"engine": "vllm", "attach": "http://x:1,http://x:2", "prefill": 1, "decode": 2}, "together be as many"),
        ({"engine": "vllm", "attach": "http://x:1", "workers": 2}, "a worker for each address"),
        ({"engine": "vllm", "attach": "http://x:1", "engine_python": "python"}, "runs already"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServeSettings(model="demo", **changes)


def test_servers_that_run_already_can_have_a_phase_each() -> None:
    given = ServeSettings(model="demo", engine="vllm", attach="http://x:1,http://x:2,http://x:3", prefill=1, decode=2)
    workers = plan_deployment(given, cores=2, gpus=()).workers
    assert [(worker.worker_id, worker.attach) for worker in workers] == [
        ("prefill-0", "http://x:1"),
        ("decode-0", "http://x:2"),
        ("decode-1", "http://x:3"),
    ]


def test_adapters_become_flags_with_a_rank_that_fits_all(tmp_path: Path) -> None:
    for name, config in (("sql", {"r": 8}), ("poet", {"r": 8, "rank_pattern": {"q_proj": 24}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        (tmp_path / name / "adapter_model.safetensors").touch()
    command = serve_command(settings(adapters={name: str(tmp_path / name) for name in ("sql", "poet")}), "m", 1)
    assert value_of(command, "--max-lora-rank") == "32"
    at = command.index("--lora-modules")
    assert command[at + 1 : at + 3] == [f"sql={tmp_path}/sql", f"poet={tmp_path}/poet"]
    assert "--enable-lora" in command
    assert "--enable-lora" not in serve_command(settings(), "m", 1)
    with pytest.raises(ModelLoadError, match=r"holds no adapter_config\.json"):
        serve_command(settings(adapters={"x": str(tmp_path / "none")}), "m", 1)


@pytest.mark.parametrize("kind", [GenerateDialect, CompletionsDialect])
def test_an_adapter_is_asked_for_by_its_name(kind: type[GenerateDialect | CompletionsDialect]) -> None:
    dialect = kind("m", takes_priority=False)
    request = Submit(
        request_id="r", token_ids=[1], prompt_token_count=1, sampling=SamplingParams(seed=0), stop=StopConditions(max_tokens=1), lora="sql"
    )
    assert json.loads(dialect.body(request, 1))["model"] == "sql"
    assert json.loads(dialect.body(msgspec.structs.replace(request, lora=None), 1))["model"] == "m"


def test_adapters_of_a_server_are_those_whose_parent_it_is() -> None:
    listed: dict[str, dict[str, Any]] = {"m": {"max_model_len": 100}, "sql": {"parent": "m"}, "alias": {"parent": None}}
    assert adapters_of(listed, "m") == ("sql",)
