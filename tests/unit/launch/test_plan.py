from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from polyphase.config import ServeSettings
from polyphase.core.errors import ConfigurationError
from polyphase.launch.accelerators import Gpu, find_gpus, parse_gpus, share_gpus
from polyphase.launch.cores import core_count, threads_per_worker
from polyphase.launch.model_source import demo_folder, resolve_model
from polyphase.launch.plan import DeploymentPlan, plan_deployment, process_specs
from polyphase.launch.process import ProcessKind
from polyphase.router import PolicySettings
from polyphase.wire.cards import Role


def plan(cores: int = 4, gpus: Sequence[Gpu] = (), **settings: object) -> DeploymentPlan:
    return plan_deployment(ServeSettings.model_validate({"model": "demo", **settings}), cores, gpus)


def flags_of(arguments: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(arguments[3::2], arguments[4::2], strict=True))


def test_one_worker_for_both_by_default():
    workers = plan().workers
    assert [(worker.worker_id, worker.role) for worker in workers] == [("worker-0", Role.BOTH)]
    assert plan().describe_workers() == "1 worker"
    assert plan(workers=3).describe_workers() == "3 workers"


def test_prefill_and_decode_workers():
    made = plan(prefill=1, decode=2)
    assert [(worker.worker_id, worker.role) for worker in made.workers] == [
        ("prefill-0", Role.PREFILL),
        ("decode-0", Role.DECODE),
        ("decode-1", Role.DECODE),
    ]
    assert made.describe_workers() == "1 prefill and 2 decode workers"
    assert plan(decode=1).describe_workers() == "1 decode worker"


def test_frontends_have_ports_of_their_own(tmp_path: Path):
    made = plan(frontends=3, port=8123, host="0.0.0.0")
    assert made.urls == ("http://127.0.0.1:8123", "http://127.0.0.1:8124", "http://127.0.0.1:8125")
    assert made.url == made.urls[0]
    assert made.describe_frontends() == "3 frontends at ports 8123 to 8125"
    specs = process_specs(made, tmp_path)
    assert [spec.name for spec in specs] == ["frontend", "frontend-1", "frontend-2", "worker-0"]
    assert [flags_of(spec.arguments)["--port"] for spec in specs[:3]] == ["8123", "8124", "8125"]
    assert plan().describe_frontends() == "1 frontend"
    with pytest.raises(ValueError, match="only 1"):
        plan(frontends=2, port=65535)


def test_workers_share_the_cores():
    assert plan(cores=8, workers=3).threads_per_worker == 2
    assert plan(cores=2, workers=3).threads_per_worker == 1
    assert plan(cores=8, workers=3, threads=5).threads_per_worker == 5
    assert threads_per_worker(16, 2) == 8


def test_processes_and_their_flags(tmp_path: Path):
    made = plan(
        cores=6,
        prefill=1,
        decode=2,
        port=8123,
        kv_memory="64MiB",
        split_threshold=32,
        served_model_name="small",
        max_running=9,
        tenant_weights="acme=3",
    )
    specs = process_specs(made, tmp_path)
    assert [(spec.name, spec.kind) for spec in specs] == [
        ("frontend", ProcessKind.FRONTEND),
        ("prefill-0", ProcessKind.WORKER),
        ("decode-0", ProcessKind.WORKER),
        ("decode-1", ProcessKind.WORKER),
    ]
    assert specs[0].arguments[:3] == (sys.executable, "-m", "polyphase.frontend")
    frontend = flags_of(specs[0].arguments)
    assert frontend["--run-folder"] == str(tmp_path)
    assert (frontend["--port"], frontend["--policy"]) == ("8123", "kv")
    assert (frontend["--max-queued-requests"], frontend["--tenant-weights"]) == ("4096", "acme=3")
    assert "--max-queued-per-tenant" not in frontend
    worker = flags_of(specs[1].arguments)
    assert (worker["--worker-id"], worker["--role"], worker["--name"]) == ("prefill-0", "prefill", "small")
    assert (worker["--kv-bytes"], worker["--thread-count"], worker["--max-running"]) == (str(64 * 1024**2), "2", "9")
    assert "--context-length" not in worker
    assert specs[1].environment["OMP_NUM_THREADS"] == "2"


def test_the_frontend_accepts_its_flags_and_routes_by_them(tmp_path: Path):
    from polyphase.frontend.__main__ import _parser, _settings

    made = plan(
        router_weights="requests=1234.5,session=0", router_temperature=0.25, session_idle="2min", split_fraction=0.5, policy="least-loaded"
    )
    _, router = _settings(_parser().parse_args(process_specs(made, tmp_path)[0].arguments[3:]))
    assert router.policy == PolicySettings("least-loaded", {"requests": 1234.5, "session": 0.0}, 0.25)
    assert (router.sessions.idle_ns, router.split.min_uncached_fraction) == (120 * 10**9, 0.5)
    with pytest.raises(ConfigurationError, match="--router-weights or --router-filters: 'x' are no weights"):
        _settings(_parser().parse_args(["--run-folder", "x", "--router-weights", "x"]))


def test_labels_reach_the_workers(tmp_path: Path):
    from polyphase.worker.options import parse_options

    made = plan(labels="zone=eu-1,rack=7")
    assert parse_options(process_specs(made, tmp_path)[1].arguments[3:]).labels == {"zone": "eu-1", "rack": "7"}
    with pytest.raises(SystemExit):
        parse_options([*process_specs(made, tmp_path)[1].arguments[3:], "--labels", "zone"])


def test_the_workers_accept_these_flags(tmp_path: Path):
    from polyphase.worker.options import parse_options

    made = plan(prefill=1, decode=1, kv_memory="64MiB", context_length=100, max_batch_tokens=64, max_running=2, dtype="float32")
    options = parse_options(process_specs(made, tmp_path)[1].arguments[3:])
    assert (options.worker_id, options.role, options.engine) == ("prefill-0", Role.PREFILL, "torch")
    assert options.engine_options.model == made.model.location
    assert options.engine_options.kv_bytes == 64 * 1024**2


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
    ],
)
def test_the_url_is_one_that_works_on_this_machine(host: str, url: str):
    assert plan(host=host).url == url


class TestModel:
    def test_demo_is_the_shipped_one(self):
        source = resolve_model("demo")
        assert source.served_name == "demo"
        assert (Path(source.location) / "config.json").is_file()

    def test_demo_of_an_installed_package(self, tmp_path: Path):
        package = tmp_path / "site-packages" / "polyphase"
        (package / "demo_model").mkdir(parents=True)
        (package / "demo_model" / "config.json").touch()
        assert demo_folder(package) == package / "demo_model"

    def test_a_missing_demo_model_is_said(self, tmp_path: Path):
        with pytest.raises(ConfigurationError, match="demo model is missing"):
            demo_folder(tmp_path / "site-packages" / "polyphase")

    def test_a_folder_is_named_after_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "small-llama").mkdir()
        with pytest.raises(ConfigurationError, match="has no config"):
            resolve_model(str(tmp_path / "small-llama"))
        (tmp_path / "small-llama" / "config.json").touch()
        monkeypatch.chdir(tmp_path)
        assert resolve_model("small-llama").location == str(tmp_path / "small-llama")
        assert resolve_model("./small-llama").served_name == "small-llama"

    def test_a_hub_name_stays_as_it_is(self):
        assert resolve_model("Qwen/Qwen3-0.6B").served_name == "Qwen/Qwen3-0.6B"

    @pytest.mark.parametrize("text", ["/no/such/folder", "./nothing", "~/no-such-model", "a/b/c"])
    def test_what_can_only_be_a_folder_must_exist(self, text: str):
        with pytest.raises(ConfigurationError, match="there is no model folder"):
            resolve_model(text)

    def test_a_file_is_no_model(self, tmp_path: Path):
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(ConfigurationError, match="is a file"):
            resolve_model(str(tmp_path / "model.safetensors"))


class TestCores:
    def test_a_container_may_have_fewer(self, tmp_path: Path):
        limit = tmp_path / "cpu.max"
        everything = core_count(limit)
        assert everything >= 1
        limit.write_text("50000 100000\n")
        assert core_count(limit) == 1
        limit.write_text("max 100000\n")
        assert core_count(limit) == everything
        limit.write_text("nonsense")
        assert core_count(limit) == everything


class TestGpus:
    TWO = (Gpu("0", 80 * 1024**3), Gpu("1", 80 * 1024**3))

    def test_each_worker_gets_its_own(self, tmp_path: Path):
        specs = process_specs(plan(gpus=self.TWO, prefill=1, decode=1), tmp_path)
        assert "CUDA_VISIBLE_DEVICES" not in specs[0].environment
        assert [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in specs[1:]] == ["0", "1"]
        assert "--kv-bytes" not in flags_of(specs[1].arguments)

    def test_workers_that_share_one_divide_half_of_it(self, tmp_path: Path):
        shares = share_gpus(self.TWO, 3)
        assert [share and (share.gpu.index, share.kv_bytes) for share in shares] == [
            ("0", 20 * 1024**3),
            ("1", None),
            ("0", 20 * 1024**3),
        ]
        specs = process_specs(plan(gpus=self.TWO, workers=3, kv_memory="1GiB"), tmp_path)
        assert flags_of(specs[1].arguments)["--kv-bytes"] == str(1024**3)

    @pytest.mark.parametrize("device", ["cpu", "cuda:1"])
    def test_a_device_that_was_named_is_left_alone(self, device: str, tmp_path: Path):
        specs = process_specs(plan(gpus=self.TWO, workers=2, device=device), tmp_path)
        assert all("CUDA_VISIBLE_DEVICES" not in spec.environment for spec in specs)

    def test_the_tool_s_answer(self):
        assert parse_gpus("0, 143771\n1, 81559\n") == [Gpu("0", 143771 * 1024**2), Gpu("1", 81559 * 1024**2)]
        assert parse_gpus("No devices were found\n0, [N/A]\n") == []

    def test_only_visible_ones_are_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho '0, 1000'\necho '1, 1000'\necho '2, 1000'\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert [gpu.index for gpu in find_gpus({})] == ["0", "1", "2"]
        assert [gpu.index for gpu in find_gpus({"CUDA_VISIBLE_DEVICES": "2,0"})] == ["2", "0"]
        assert find_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
        tool.write_text("#!/bin/sh\nexit 9\n")
        assert find_gpus({}) == []


def test_a_mock_engine_takes_no_gpu(tmp_path: Path):
    made = plan(gpus=[Gpu("0", 80 * 2**30)], engine="mock", mock_accelerator="4xh100", mock_speedup=10)
    assert made.workers[0].share is None
    worker = flags_of(process_specs(made, tmp_path)[1].arguments)
    assert (worker["--engine"], worker["--mock-accelerator"], worker["--mock-speedup"]) == ("mock", "4xh100", "10.0")
    assert "--mock-model" not in worker


def test_many_mock_workers_share_processes(tmp_path: Path):
    from polyphase.worker.options import parse_options

    made = plan(engine="mock", workers=200)
    specs = process_specs(made, tmp_path)[1:]
    assert len(specs) == 8
    options = [parse_options(spec.arguments[3:]) for spec in specs]
    assert [spec.name for spec in specs] == [one.worker_id for one in options]
    names = [name for one in options for name in (one.worker_id, *one.beside)]
    assert names == [worker.worker_id for worker in made.workers]


@pytest.mark.parametrize("settings", [{"engine": "mock", "workers": 8}, {"engine": "torch", "workers": 12}])
def test_other_workers_have_a_process_each(tmp_path: Path, settings: dict[str, object]):
    made = plan(**settings)
    assert [spec.name for spec in process_specs(made, tmp_path)[1:]] == [worker.worker_id for worker in made.workers]


def test_many_mock_workers_of_both_roles(tmp_path: Path):
    made = plan(engine="mock", prefill=3, decode=17)
    specs = process_specs(made, tmp_path)[1:]
    assert [spec.name for spec in specs] == ["prefill-0", "decode-0", "decode-3", "decode-6", "decode-9", "decode-12", "decode-15"]
    assert flags_of(specs[0].arguments)["--beside"] == "prefill-1,prefill-2"
