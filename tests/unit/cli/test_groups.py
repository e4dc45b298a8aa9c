"""Several groups of workers: from a file to settings, to a plan, to the flags of processes; and the command that adds workers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

import pytest

from polyphase.cli.app import join, serve
from polyphase.config import GroupSettings, load_serve_settings
from polyphase.core.errors import ConfigurationError
from polyphase.launch.joining import plan_joining
from polyphase.launch.plan import DeploymentPlan, plan_deployment, process_specs, worker_specs
from polyphase.launch.run_folder import DeploymentRecord
from polyphase.worker.options import parse_options

FLEET = """
port = 8123
engine = "mock"
[router]
policy = "least-loaded"
[[groups]]
model = "demo"
served_model_name = "small"
aliases = ["gpt-4", "gpt-4o"]
prefill = 1
decode = 1
weight = 3
lora = { sql = "~/sql" }
[[groups]]
model = "demo"
served-model-name = "small"
engine = "vllm"
attach = ["http://127.0.0.1:9000"]
weight = 1
[[groups]]
model = "demo"
served_model_name = "large"
workers = 2
labels = { zone = "eu-1" }
"""


def plan_of(
    text: str, tmp_path: Path, flags: Mapping[str, object] | None = None, environment: Mapping[str, str] | None = None
) -> DeploymentPlan:
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    return plan_deployment(load_serve_settings(flags or {}, environment or {}, file), cores=4, gpus=())


def test_groups_of_a_file_become_processes(tmp_path: Path) -> None:
    plan = plan_of(FLEET, tmp_path)
    assert (plan.settings.port, plan.settings.policy, plan.model_names) == (8123, "least-loaded", ["small", "large"])
    assert plan.describe_workers() == "1 prefill and 1 decode workers, and 3 for both"
    frontend, *workers = process_specs(plan, tmp_path)
    assert frontend.name == "frontend"
    options = [parse_options(spec.arguments[3:]) for spec in workers]
    assert [one.worker_id for one in options] == ["prefill-0", "decode-0", "worker-0", "worker-1", "worker-2"]
    assert [one.engine for one in options] == ["mock", "mock", "vllm", "mock", "mock"]
    assert [one.engine_options.name for one in options] == ["small", "small", "small", "large", "large"]
    assert [(one.group, one.weight) for one in options[1:4]] == [("mock", 3.0), ("vllm", 1.0), ("mock", None)]
    assert (options[0].aliases, options[3].aliases) == (("gpt-4", "gpt-4o"), ())
    assert options[0].engine_options.adapters == {"sql": str(Path("~/sql").expanduser())}
    assert options[2].engine_options.attach == "http://127.0.0.1:9000"
    assert options[4].labels == {"zone": "eu-1"}


def test_flags_and_variables_hold_for_all_groups(tmp_path: Path) -> None:
    plan = plan_of(FLEET, tmp_path, {"port": 9, "kv_memory": "64MiB"}, {"POLYPHASE_CONTEXT_LENGTH": "500"})
    assert plan.settings.port == 9
    assert {(group.settings.kv_memory, group.settings.context_length) for group in plan.groups} == {(64 << 20, 500)}


@pytest.mark.parametrize(
    ("change", "flags", "sentence"),
    [
        (("model = \"demo\"", "modle = \"demo\""), {}, "sets 'groups[0].modle', which is not a setting; did you mean groups[0].model?"),
        (("weight = 3", "weight = -1"), {}, "groups[0].weight in"),
        (("weight = 3", "group = 'a b'"), {}, "'a b' cannot name a group"),
        (("workers = 2", "port = 3"), {}, "sets 'groups[2].port', which is not a setting"),
        (("", ""), {"model": "demo"}, "MODEL is for one group of workers, and"),
        (("", ""), {"workers": 2}, "--workers is for one group of workers, and"),
        (("[[groups]]\nmodel = \"demo\"\nserved_model_name = \"large\"", "[[groups]]"), {}, "a group in"),
        (("aliases = [\"gpt-4\", \"gpt-4o\"]", "aliases = [\"large\"]"), {}, "both an alias of the model 'small' and the name of a model"),
        (("sql = ", "large = "), {}, "would be both a LoRA adapter of the model 'small' and the name of a model"),
        (("engine = \"vllm\"\nattach = [\"http://127.0.0.1:9000\"]", ""), {}, "two groups 'mock' of the model 'small' have"),
        (("attach = [", "lora = {a = \"b\"}\nattach = ["), {}, "has loaded its adapters itself"),
        (("aliases = [\"gpt-4\", \"gpt-4o\"]", "aliases = [\"a,b\"]"), {}, "the alias 'a,b' cannot be one"),
        (("[[groups]]", "[groups]", ), {}, "write each group as a table of its own"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: tuple[str, str], flags: dict[str, object], sentence: str, tmp_path: Path) -> None:
    text = FLEET.replace(*change, 1) if change != ("[[groups]]", "[groups]") else "[groups]\nmodel = 'demo'"
    with pytest.raises(ConfigurationError) as caught:
        plan_of(text, tmp_path, flags)
    assert sentence in caught.value.message


def test_join_has_the_flags_of_serve_that_are_for_workers() -> None:
    names = set(inspect.signature(join).parameters)
    assert names == set(GroupSettings.model_fields) | {"name", "start_timeout", "drain_timeout"}
    assert names <= set(inspect.signature(serve).parameters)


def test_workers_that_join_get_names_that_nobody_has(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "worker-0.log").touch()
    record = DeploymentRecord(
        name="default", model="demo", url="http://127.0.0.1:1", pid=1, run_folder=str(tmp_path), worker_ids=["worker-0"], started_unix_s=0
    )
    settings = load_serve_settings({"model": "demo", "engine": "mock", "workers": 2, "group": "canary", "weight": "0.5"}, {})
    plan = plan_joining(settings, record)
    assert [worker.worker_id for worker in plan.workers] == ["worker-1", "worker-2"]
    assert [worker.worker_id for worker in plan_joining(settings, record).workers] == ["worker-3", "worker-4"]
    options = parse_options(worker_specs(plan, tmp_path)[0].arguments[3:])
    assert (options.group, options.weight, options.run_folder) == ("canary", 0.5, tmp_path)


APART = """
engine = "mock"
[[groups]]
model = "demo"
group = "x"
prefill = 2
max_running = 8
[[groups]]
model = "demo"
group = "x"
decode = 1
"""


def test_prefill_and_decode_workers_of_one_group_may_stand_in_two_tables(tmp_path: Path) -> None:
    plan = plan_of(APART, tmp_path)
    assert plan.describe_workers() == "2 prefill and 1 decode workers"
    options = [parse_options(spec.arguments[3:]) for spec in worker_specs(plan, tmp_path)]
    assert [(one.worker_id, one.role, one.group) for one in options] == [
        ("prefill-0", "prefill", "x"),
        ("prefill-1", "prefill", "x"),
        ("decode-0", "decode", "x"),
    ]
    assert [one.engine_options.max_running for one in options] == [8, 8, None]
    assert plan_of(APART.replace("decode = 1", "workers = 1"), tmp_path).describe_workers() == "2 prefill workers, and 1 for both"


@pytest.mark.parametrize("change", [("decode = 1", "prefill = 1"), ("decode = 1", "decode = 1\nengine = \"vllm\""), ("\"x\"", "\"y\""),
                                    ("\"demo\"", "\"demo\"\nserved_model_name = \"other\"")])  # fmt: skip
def test_prefill_workers_that_could_hand_over_to_nobody_are_refused(change: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"the prefill workers of the group '.' of the model '.*' need mock workers of that group"):
        plan_of(APART.replace(*change, 1), tmp_path)


def test_prefill_workers_alone_may_join_but_not_serve(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    record = DeploymentRecord(
        name="default", model="demo", url="http://127.0.0.1:1", pid=1, run_folder=str(tmp_path), worker_ids=["decode-0"], started_unix_s=0
    )
    settings = load_serve_settings({"model": "demo", "engine": "mock", "prefill": 1}, {})
    assert [worker.worker_id for worker in plan_joining(settings, record).workers] == ["prefill-0"]
    with pytest.raises(ConfigurationError, match="--prefill 1 --decode 2"):
        plan_deployment(settings, cores=4, gpus=())
