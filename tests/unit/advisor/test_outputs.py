from __future__ import annotations

import csv
import json
import re
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from polyphase.advisor.advice import Advice, Inquiry, Part, advise
from polyphase.advisor.catalog import shipped_calibration
from polyphase.advisor.deployment import Serving, Speculation, Traffic
from polyphase.advisor.fleet import parse_fleet
from polyphase.advisor.goal import Goal
from polyphase.advisor.mapping import ParallelMapping
from polyphase.advisor.outputs.launch_files import launch_files
from polyphase.advisor.outputs.page import as_page
from polyphase.advisor.outputs.records import as_csv, as_json
from polyphase.config import load_serve_settings
from polyphase.engines.vllm.flags import serve_command
from polyphase.engines.vllm.settings import VllmSettings

from .building import LIBRARY

TRAFFIC = Traffic(2000, 300)


def answer(serving: Serving, model: str = "deepseek-v3", fleet: str = "24xh200", **more) -> Advice:
    goal = Goal(itl_ms=60, ttft_ms=5000)
    question = Inquiry(LIBRARY.model(model), parse_fleet(fleet, LIBRARY), TRAFFIC, goal, ("vllm",), ("fp8",), (serving,), **more)
    return advise(shipped_calibration(), question)


WHOLE, APART = answer(Serving.AGGREGATED), answer(Serving.DISAGGREGATED)


@pytest.mark.parametrize("advice", [WHOLE, APART])
def test_json_and_csv_hold_the_same_deployments(advice: Advice) -> None:
    content = json.loads(as_json(advice))
    rows = list(csv.DictReader(as_csv(advice.frontier).splitlines()))
    assert [row["layout"] for row in rows] == [record["layout"] for record in content["frontier"]]
    for row, option in zip(rows, advice.frontier, strict=True):
        assert float(row["tok_s_per_gpu"]) == pytest.approx(option.tok_s_per_gpu, rel=1e-4)
        assert float(row["itl_ms_low"]) < float(row["itl_ms"]) < float(row["itl_ms_high"])
        # The definitions of the reference: per megawatt and per dollar, from all-in power and price.
        assert float(row["tok_s_per_mw"]) == pytest.approx(option.tok_s_per_gpu / 1.73e-3, rel=1e-3)
        assert float(row["dollars_per_mtok"]) == pytest.approx(1.41 / 3600 / option.tok_s_per_gpu * 1e6, rel=1e-3)
        assert float(row["joule_per_token"]) > float(row["board_joule_per_token"])


def test_the_page_needs_no_network_and_holds_the_answers() -> None:
    page = as_page([WHOLE, APART], "acme/</script><b>")
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert page.count("</script>") == 2
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert data
    content = json.loads(data[1])
    assert [len(entry["frontier"]) for entry in content] == [len(WHOLE.frontier), len(APART.frontier)]
    assert "acme/</script><b>" in content[0]["frontier"][0]["launch"]


def test_launch_files_for_every_engine() -> None:
    files = launch_files(WHOLE.best[0], "deepseek-ai/DeepSeek-V3", TRAFFIC)
    assert set(files) == {"polyphase.toml", "serve.sh", "vllm.sh", "sglang.sh", "trtllm.sh", "trtllm.yaml", "kubernetes.yaml"}
    part = WHOLE.best[0].decode
    words = files["vllm.sh"].replace("\\\n", " ").split()
    assert words[words.index("--tensor-parallel-size") + 1] == str(part.mapping.tp)
    assert words[words.index("--max-num-seqs") + 1] == str(WHOLE.best[0].batch)
    assert "--config polyphase.toml" in files["serve.sh"]
    (group,) = tomllib.loads(files["polyphase.toml"])["groups"]
    assert (group["model"], group["engine"], group["workers"]) == ("deepseek-ai/DeepSeek-V3", part.setting.backend, WHOLE.best[0].units)
    assert str(part.mapping.tp) in group["engine_args"]
    assert f"replicas: {WHOLE.best[0].units}" in files["kubernetes.yaml"]


def test_launch_files_of_a_split_deployment() -> None:
    option = APART.best[0]
    assert option.prefill
    files = launch_files(option, "deepseek-ai/DeepSeek-V3", TRAFFIC)
    expected = {f"{engine}-{role}.sh" for engine in ("vllm", "sglang", "trtllm") for role in ("prefill", "decode")}
    assert set(files) == expected | {"polyphase.toml", "serve.sh", "trtllm-prefill.yaml", "trtllm-decode.yaml", "kubernetes.yaml"}
    first, second = tomllib.loads(files["polyphase.toml"])["groups"]
    assert first["prefill"] == option.units * option.prefill.workers
    assert second["decode"] == option.units * option.decode.workers
    assert first["group"] == second["group"]
    assert '"kv_role": "kv_producer"' in files["vllm-prefill.sh"]
    assert "--disaggregation-mode decode" in files["sglang-decode.sh"]
    assert "cache_transceiver_config" in files["trtllm-decode.yaml"]
    documents = files["kubernetes.yaml"].split("---\n")
    assert [re.search(r"kind: (\w+)", document)[1] for document in documents] == ["Deployment", "Service"] * 2  # type: ignore[index]
    assert len(re.findall(r"^kind: Deployment", files["kubernetes.yaml"], re.M)) == 2


@pytest.mark.parametrize("advice", [WHOLE, APART])
def test_serve_reads_the_written_file_and_starts_what_was_advised(advice: Advice, tmp_path: Path) -> None:
    option = replace(advice.best[0], decode=drafting(advice.best[0].decode))  # whose flags hold JSON
    (tmp_path / "polyphase.toml").write_text(launch_files(option, 'acme/model\'s "own"', TRAFFIC)["polyphase.toml"])
    settings = load_serve_settings({}, {}, tmp_path / "polyphase.toml")
    parts = [option.decode] if option.prefill is None else [option.prefill, option.decode]
    assert len(settings.worker_groups) == len(parts)
    for group, part in zip(settings.worker_groups, parts, strict=True):
        assert (group.model, group.engine) == ('acme/model\'s "own"', "vllm")
        assert (group.workers or group.prefill or group.decode) == option.units * part.workers
        assert group.accelerators == part.mapping.gpu_count
        command = serve_command(
            VllmSettings(
                model=group.model,
                name=None,
                folder=tmp_path,
                command="vllm serve",
                arguments=group.engine_args or "",
                context_length=group.context_length,
                max_running=group.max_running,
                hands_over=option.prefill is not None,
            ),
            "name",
            8000,
        )
        values = dict(pairwise(command))
        assert values["serve"] == group.model
        assert values["--tensor-parallel-size"] == str(part.mapping.tp)
        assert int(values["--max-model-len"]) >= TRAFFIC.whole_tokens
        assert ("--kv-transfer-config" in values) == (option.prefill is not None)
        assert command.count("--max-num-seqs") == command.count("--max-model-len") == 1
    assert json.loads(values["--speculative-config"]) == {"method": "mtp", "num_speculative_tokens": 2}


def drafting(part: Part) -> Part:
    return replace(part, setting=replace(part.setting, speculation=Speculation(2, 0.8)))


def test_what_a_mapping_needs_is_among_the_flags() -> None:
    drafting = answer(Serving.AGGREGATED, speculation=Speculation(1, 0.9))
    option = drafting.frontier[0]
    wide = replace(option, decode=replace(option.decode, mapping=ParallelMapping(2, 1, 4, 1, 8)))
    files = launch_files(wide, "model", TRAFFIC)
    for text in ("--data-parallel-size", "--enable-expert-parallel", "num_speculative_tokens"):
        assert text in files["vllm.sh"]
    for text in ("--enable-dp-attention", f"--tp {wide.decode.mapping.tp * wide.decode.mapping.dp}", "NEXTN"):
        assert text in files["sglang.sh"]
    assert "enable_attention_dp: true" in files["trtllm.yaml"]


def test_a_folder_with_odd_letters_stays_one_word() -> None:
    files = launch_files(WHOLE.best[0], "/models/it's here", TRAFFIC)
    assert "'/models/it'\"'\"'s here'" in files["vllm.sh"]
    assert "'/models/it''s here'" in files["kubernetes.yaml"]
    assert tomllib.loads(files["polyphase.toml"])["groups"][0]["model"] == "/models/it's here"
