from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyphase.cli.app import app
from polyphase.cli.scatter import scatter
from tests.unit.advisor.building import COLUMNS, disaggregated_row, row

RUNNER = CliRunner()
QUICK = ["--backend", "vllm", "--precision", "fp8", "--isl", "1000", "--osl", "100"]


def run(*words: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, list(words))
    return result.exit_code, result.output


def test_an_answer_for_people_and_its_files(tmp_path: Path) -> None:
    code, said = run("advise", "llama-3.1-8b", "--fleet", "2xh200", *QUICK, "--ttft", "2s", "--itl", "50ms", "--out", str(tmp_path / "a"))
    assert code == 0, said
    assert "deployments evaluated" in said
    assert "tokens/s per accelerator" in said
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"page.html", "advice.json", "frontier.csv", "launch"}
    assert (tmp_path / "a" / "launch" / "serve.sh").stat().st_mode & 0o100


def test_json_is_one_object_for_one_fleet_and_a_list_for_more() -> None:
    code, said = run("advise", "llama-3.1-8b", "--fleet", "1xh100", *QUICK, "--json")
    assert code == 0
    assert json.loads(said)["fleet"] == "1xh100"
    code, said = run("advise", "llama-3.1-8b", "--fleet", "1xh100", "--fleet", "1xb200", *QUICK, "--json")
    assert [entry["fleet"] for entry in json.loads(said)] == ["1xh100", "1xb200"]


def test_how_many_accelerators_a_rate_needs() -> None:
    code, said = run("advise", "llama-3.1-8b", "--fleet", "64xh200", *QUICK, "--itl", "30ms", "--rate", "200", "--json")
    assert code == 0
    size = json.loads(said)[0]
    assert size["gpus"] >= 1
    assert size["slots_used"] < 1


def test_what_a_rate_needs_is_held_against_power_and_price() -> None:
    words = ("advise", "llama-3.1-8b", "--fleet", "64xh200", *QUICK, "--itl", "30ms", "--rate", "200")
    code, said = run(*words, "--power", "1kW", "--cost", "1")
    assert code == 0
    assert "kW where 1 kW are allowed" in said
    assert "an hour where $1 are allowed" in said
    code, said = run(*words, "--power", "10MW", "--json")
    assert code == 0
    assert json.loads(said)[0]["broken_bounds"] == []


def test_nothing_meets_the_goal() -> None:
    code, said = run("advise", "llama-3.1-8b", "--fleet", "1xh100", *QUICK, "--itl", "0.1ms")
    assert code == 0
    assert "Nothing meets the goal. Nearest comes" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--itl", "20"], "--itl '20' is not a time; write for example --itl 1s or 20ms"),
        (["--ttft", "soon"], "--ttft 'soon' is not a time"),
        (["--power", "5"], "--power '5' is not a power; write for example --power 120kW"),
        (["--isl", "many"], "--isl 'many' is not a number"),
        (["--isl", "0"], "--isl '0' is no number of tokens"),
        (["--lengths", "1000/200", "--isl", "3"], "--lengths and --isl and --osl say the same"),
        (["--lengths", "long"], "--lengths 'long' is no distribution"),
        (["--prefix-hit", "140%"], "--prefix-hit '140%' is neither"),
        (["--serving", "both"], "--serving 'both' is neither agg nor disagg"),
        (["--backend", "llama.cpp"], "there is no engine 'llama.cpp'"),
        (["--precision", "fp3"], "there is no precision 'fp3'"),
        (["--mtp", "0.5"], "--mtp '0.5' is no number of tokens"),
        (["--trace", "/nowhere.csv"], "cannot read the trace /nowhere.csv"),
        (["--rate", "0"], "a rate of 0 requests a second"),
        (["--calibration", "/nowhere.json"], "cannot read the calibration"),
    ],
)
def test_wrong_flags_are_one_sentence(words: list[str], message: str) -> None:
    code, said = run("advise", "llama-3.1-8b", "--fleet", "1xh100", *words)
    assert code == 1
    assert message in said
    assert "Traceback" not in said


def test_models_and_accelerators_of_ones_own(tmp_path: Path) -> None:
    config = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 1000, "intermediate_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sheet = tmp_path / "chip.toml"
    sheet.write_text('name = "chip"\nmemory_gb = 64\nmemory_tb_s = 2\nbf16_tflops = 400\nlink_gb_s = 200\ndomain_gpus = 4\n')
    words = ["--backend", "vllm", "--isl", "500", "--osl", "50", "--json", "--accelerator-file", str(sheet)]
    code, said = run("advise", str(tmp_path), "--fleet", "4xchip", *words)
    assert code == 0, said
    assert json.loads(said)["best"][0]["basis"] == "roofline with physical priors"


@pytest.mark.parametrize(
    "text", ['{"input_length": 1200, "output_length": 80}\n' * 3, "TIMESTAMP,ContextTokens,GeneratedTokens\n0,1200,80\n1,1200,80\n"]
)
def test_traces_of_both_forms(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace").write_text(text)
    code, said = run("advise", "llama-3.1-8b", "--fleet", "1xh100", "--backend", "vllm", "--trace", str(tmp_path / "trace"), "--json")
    assert code == 0, said
    assert (json.loads(said)["isl"], json.loads(said)["osl"]) == (1200, 80)


def write_table(file: Path, rows: list[dict[str, str | None]]) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return file


def test_evaluate_reports_and_counts(tmp_path: Path) -> None:
    rows = [row(), row(batch_size=""), disaggregated_row(), row(model_path="acme/x"), row(silicon_tpot_ms="")]
    code, said = run("advisor", "evaluate", str(write_table(tmp_path / "t.csv", rows)), "--json")
    assert code == 0, said
    found = json.loads(said)
    names = ("itl_median_pct", "itl_p90_pct", "tput_median_pct", "ttft_median_pct", "interval80_coverage_pct")
    for place in (found, found["total"], found["groups"]["backend"]["vllm"]):
        assert all(isinstance(place[name], float) for name in names)
    assert found["rows_used"] == found["count"] == 3
    assert found["skipped"] == {"unknown model acme/x": 1, "silicon_tpot_ms is blank or 0": 1}


@pytest.mark.parametrize(("text", "message"), [("", "holds no rows"), ("a,b\n1,2\n", "lacks the columns"), (None, "cannot read the table")])
def test_tables_that_cannot_be_evaluated(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "t.csv"
    if text is not None:
        file.write_text(text)
    code, said = run("advisor", "evaluate", str(file))
    assert code == 1
    assert message in said


def test_a_scatter_plot_marks_every_corner() -> None:
    text = scatter({"one": [(0.0, 10.0), (5.0, 0.0)]}, "x", "y", width=40, height=5)
    lines = text.split("\n")
    assert lines[1].endswith("┤●")
    assert lines[5].endswith("●")
    assert scatter({}, "x", "y", width=40, height=5) == ""
