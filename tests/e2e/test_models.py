"""Several models, engines and adapters behind one frontend, with workers that come and go."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from polyphase.testing import Deployment
from tests.unit.engine.adapters import ATTENTION, merged_peer, save_adapter

from .conftest import MODEL_FOLDER, GreedyTokens, completed_ids, prompt_of
from .test_faults import first_of, rest_of

EXACT = {"ignore_eos": True, "return_token_ids": True}
FLEET = """
context_length = 1024
kv_memory = "64MiB"
[[groups]]
model = "demo"
aliases = ["gpt-4"]
group = "stable"
weight = 3
lora = {{ sql = "{adapter}" }}
[[groups]]
model = "demo"
group = "canary"
weight = 1
block_size = 32
[[groups]]
model = "demo"
served_model_name = "other"
engine = "mock"
mock_speedup = "inf"
kv_memory = "4GiB"
lora = {{ imagined = "/anywhere" }}
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_adapter(tmp_path_factory.mktemp("sql"), str(MODEL_FOLDER), 1, ATTENTION)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, adapter: str) -> Iterator[Deployment]:
    file = tmp_path_factory.mktemp("fleet") / "fleet.toml"
    file.write_text(FLEET.format(adapter=adapter))
    with Deployment(None, "--config", str(file)) as served:
        yield served


@pytest.fixture
def client(fleet: Deployment) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0, timeout=60)


def names(client: openai.OpenAI) -> list[str]:
    return [model.id for model in client.models.list()]


def served_by(client: openai.OpenAI, model: str, prompt: list[int]) -> str:
    return client.completions.with_raw_response.create(model=model, prompt=prompt, max_tokens=1).headers["x-polyphase-decode-worker"]


def test_models_aliases_and_adapters_are_listed_and_answer(
    fleet: Deployment, client: openai.OpenAI, greedy: GreedyTokens, adapter: str
) -> None:
    listed = {model.id: model.model_extra for model in client.models.list()}
    roots = {name: (fields["root"], fields["parent"]) for name, fields in listed.items() if fields is not None}
    assert roots == {
        "demo": ("demo", None), "gpt-4": ("demo", None), "sql": ("sql", "demo"),
        "other": ("other", None), "imagined": ("imagined", "other"),
    }  # fmt: skip
    prompt = prompt_of(100, seed=70)
    wanted = {"demo": greedy(prompt, 12), "gpt-4": greedy(prompt, 12), "sql": merged_peer(str(MODEL_FOLDER), adapter).greedy(prompt, 12)}
    assert wanted["sql"] != wanted["demo"]
    for _ in range(3):  # from the cache, too, and at both workers of demo
        for model, ids in wanted.items():
            answer = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=12, extra_body=EXACT)
            assert (answer.model, completed_ids(answer)) == (model, ids)
    plain, imagined = (
        completed_ids(client.completions.create(model=model, prompt=prompt, max_tokens=12, extra_body=EXACT))
        for model in ("other", "imagined")
    )
    assert plain != imagined


def test_groups_get_their_shares(client: openai.OpenAI) -> None:
    places = Counter(served_by(client, "demo", prompt_of(20, seed=100 + number)) for number in range(40))
    assert 28 <= places["worker-0"] <= 32  # 30, but for what one test before was ahead


def test_a_killed_worker_is_not_noticed_though_its_blocks_have_another_size(
    fleet: Deployment, client: openai.OpenAI, greedy: GreedyTokens
) -> None:
    fleet.wait_for(lambda: len(fleet.health()["models"]["demo"]["workers"]) == 2, "both workers of demo", 100)
    prompt = prompt_of(200, seed=71)
    stream = client.completions.create(model="gpt-4", prompt=prompt, temperature=0, max_tokens=150, stream=True, extra_body=EXACT)
    request_id = stream.response.headers["x-request-id"]
    ids = first_of(stream, 20)
    before = fleet.record(request_id)["decode_worker"]
    os.kill(fleet.workers()[before].pid, signal.SIGKILL)
    rest, finish = rest_of(stream)
    assert (ids + rest, finish) == (greedy(prompt, 150), "length")
    record = fleet.record(request_id)
    assert (record["migrations"], {before, record["decode_worker"]}) == (1, {"worker-0", "worker-1"})
    fleet.wait_for(lambda: len(fleet.health().get("models", {}).get("demo", {}).get("workers", {})) == 2, "the killed worker", 100)


def test_a_model_comes_and_goes_with_its_worker(fleet: Deployment, client: openai.OpenAI) -> None:
    worker = next(entry for entry in fleet.workers().values() if entry.model == "other")
    os.kill(worker.pid, signal.SIGKILL)
    fleet.wait_for(lambda: "other" not in names(client), "the model to disappear")
    assert "imagined" not in names(client)
    for model in ("other", "imagined"):
        with pytest.raises(openai.InternalServerError, match=f"no worker serves the model '{model}'") as caught:
            client.completions.create(model=model, prompt="x")
        assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "5")
    assert client.completions.create(model="demo", prompt="x", max_tokens=1).model == "demo"
    fleet.wait_for(lambda: "imagined" in names(client), "the supervisor to start it again", 60)
    assert client.completions.create(model="other", prompt="x", max_tokens=1).model == "other"


def test_workers_join_and_leave(fleet: Deployment, client: openai.OpenAI) -> None:
    with fleet.joined("demo", "--engine", "mock", "--served-model-name", "third", "--aliases", "3rd", "--mock-speedup", "inf"):
        assert {"third", "3rd"} <= set(names(client))
        assert client.completions.create(model="3rd", prompt="x", max_tokens=3).model == "3rd"
        status = fleet.command("status").communicate(timeout=60)[0]
    fleet.wait_for(lambda: "third" not in names(client), "the model to leave")
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="third", prompt="x")
    assert "third is also served as 3rd" in status
    assert "shares of demo: canary 25%, stable 75%" in status or "shares of demo: stable 75%, canary 25%" in status
    lines = status.splitlines()
    assert [line.strip() for line in lines if line.strip() in ("demo", "other", "third")] == ["demo", "other", "third"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--served-model-name", "gpt-4"), "and that is an alias of the model 'demo' already"),
        (("--served-model-name", "x", "--aliases", "other"), "and that is a model already"),
    ],
)
def test_a_name_that_is_taken_ends_the_joining(fleet: Deployment, options: tuple[str, ...], sentence: str) -> None:
    process = fleet.command("join", "demo", "--engine", "mock", *options)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert sentence in " ".join(said.split())
    assert not fleet.health()["turned_away"]


def test_workers_that_joined_end_with_the_deployment() -> None:
    with Deployment("demo", "--engine", "mock") as served, served.joined("demo", "--engine", "mock") as joined:
        assert len(served.health()["models"]["demo"]["workers"]) == 2
        assert served.process is not None
        served.process.send_signal(signal.SIGTERM)
        assert (served.process.wait(60), joined.wait(60)) == (0, 0)


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[[groups]]\nmodel = 'demo'\naliases = ['b']\n[[groups]]\nmodel = 'demo'\nserved_model_name = 'b'\n")
    with Deployment("demo", "--engine", "mock") as served:
        process = served.command("serve", "--config", str(tmp_path / "x.toml"), "--name", "two")
        assert "'b' would be both an alias of the model 'demo' and the name of a model" in " ".join(
            process.communicate(timeout=60)[0].split()
        )
        assert httpx.get(f"{served.url}/health").status_code == 200
