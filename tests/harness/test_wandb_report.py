"""The report and the views in W&B: what they are made of, without a server, and that a server gets them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from fake_records import CLOZE, LONG, XEON, record, sweep, write_all
from wandb_stand_in import StandIn

from harness import wandb_report
from harness.tracking import flat_config, summary
from harness.wandb_report import blocks_shown, curves, specification

pytest.importorskip("wandb_workspaces")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture(scope="module")
def made():
    """The specification of a sweep with a pruned model, and its records."""
    trained = replace(record("peqa", 4, loss=0.02), curves={"training loss": [[1, 3.0], [2, 2.0]]})
    records = [*sweep(), record("wanda", loss=0.1), trained]
    return records, specification(blocks_shown(records), "project", "A title")


def grids(spec: dict) -> list[dict]:
    return [block["metadata"] for block in spec["report"]["spec"]["blocks"] if block["type"] == "panel-grid"]


def drawn(spec: dict) -> list[dict]:
    return [panel for grid in grids(spec) for panel in grid["panelBankSectionConfig"]["panels"]]


def conditions(runset: dict) -> dict:
    return {entry["key"]["name"]: entry["value"] for entry in runset["filters"]["filters"]}


def test_headings_are_the_tables_that_have_records_in_print_order(made):
    _, spec = made
    headings = [b["children"][0]["text"] for b in spec["report"]["spec"]["blocks"] if b["type"] == "heading"]
    assert headings == ["Table I: Quantization", "Table II: Pruning", "Every number", "What failed"]
    assert [view["name"] for view in spec["workspaces"]] == headings[:2]


def test_every_runset_holds_the_runs_of_its_group_and_no_others(made):
    """The conditions, applied to the configurations that the tracker logs."""
    records, spec = made
    by_name = {runset["name"]: conditions(runset) for grid in grids(spec)[:2] for runset in grid["runSets"]}
    chosen = {
        name: {r.id for r in records if all(flat_config(r).get(key) == value for key, value in wanted.items())}
        for name, wanted in by_name.items()
    }
    finished = [r for r in records if r.status == "finished"]
    assert chosen["Weight only"] == {r.id for r in finished if r.card["name"] in ("rtn", "gptq", "awq")}
    assert chosen["Unstructured"] == {r.id for r in finished if r.card["name"] == "wanda"}
    assert chosen["Dense"] == {r.id for r in finished if r.card["name"] == "dense"}


def test_panels_ask_for_numbers_that_the_tracker_logs(made):
    records, spec = made
    logged = set().union(*(summary(r) for r in records))
    asked = set(re.findall(r'"summary(?:_metrics\.|:)(\w+)"', json.dumps(drawn(spec))))
    assert asked <= logged
    assert any(name.startswith("perplexity_ratio_wikipedia") for name in asked)


def test_panels_are_bars_a_front_latency_and_learning_curves(made):
    _, spec = made
    kinds = [panel["viewType"] for panel in drawn(spec)]
    assert {"Bar Chart", "Scatter Plot", "Run History Line Plot", "Weave"} == set(kinds)
    front = next(p["config"] for p in drawn(spec) if "effective_bits" in str(p["config"].get("xAxis")))
    assert front["showMinYAxisLine"]
    assert front["zAxis"] == "config:bits.value"
    assert any("time_per_output_token_ms" in str(panel["config"].get("metrics")) for panel in drawn(spec))


def test_panels_of_a_grid_do_not_overlap(made):
    _, spec = made
    for grid in grids(spec):
        places = [tuple(panel["layout"].values()) for panel in grid["panelBankSectionConfig"]["panels"]]
        assert len(set(places)) == len(places)


def test_two_protocols_are_two_grids_with_filters_that_differ():
    records = [record("gptq", 4, on=on, machine=machine) for on, machine in ((LONG, XEON), (CLOZE, XEON))]
    first, second = grids(specification(blocks_shown(records), "project", "title"))[:2]
    assert conditions(first["runSets"][0])["perplexity_on"] != conditions(second["runSets"][0])["perplexity_on"]


def test_curves_that_differ_in_a_number_share_a_panel_and_notes_are_none():
    shape = {f"block {k} loss": [[0, 1.0], [1, 0.5]] for k in range(30)}
    run = replace(record("peqa", 4), curves={**shape, "training loss": [[0, 1.0], [1, 2.0]], "a note": [[0, 1.0]]})
    (block,) = blocks_shown([run])
    assert curves(block) == [("^training_loss$", "training loss"), ("^block_[0-9]+_loss$", "block … loss")]


def test_hostile_names_stay_text():
    name = "m'] or True or Config('a') == 'b <script>| [x](javascript:1)"
    records = [record("gptq", 4, model=name), record("dense", model=name)]
    spec = specification(blocks_shown(records), "project", "title")
    assert conditions(grids(spec)[0]["runSets"][0]) == {"method": "dense", "record": sorted(r.id for r in records)}
    (written,) = [b["content"] for b in spec["report"]["spec"]["blocks"] if b["type"] == "markdown-block"]
    assert "<script>" not in written


def test_a_server_gets_report_and_views_and_a_second_time_the_same_ones(tmp_path):
    write_all(sweep(), tmp_path)
    code = "import sys; from harness.wandb_report import main\nfor _ in range(2): assert main(sys.argv[1:]) == 0"
    server = StandIn()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, f"paths.results={tmp_path}", "project=project"],
            env={**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40},
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2], done.stdout.splitlines()[2:]
    assert first == second
    assert all(server.url in line for line in first)
    assert sorted(view["type"] for view in server.views.values()) == ["project-view", "runs"]
    sent = grids({"report": {"spec": server.specification("runs")}})
    assert sent[0]["runSets"][1]["name"] == "Weight only"
    assert sent[0]["runSets"][1]["project"]["name"] == "project"
    assert server.specification("project-view")["section"]["panelBankConfig"]["sections"]
    assert not server.unknown


def test_without_a_key_it_says_what_to_do_and_a_file_can_be_had(tmp_path, capsys):
    write_all(sweep(), tmp_path)
    assert wandb_report.main([f"paths.results={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "has no key" in said
    assert "spec=FILE" in said
    assert wandb_report.main([f"paths.results={tmp_path}", f"spec={tmp_path / 'spec.json'}"]) == 0
    assert json.loads((tmp_path / "spec.json").read_text())["report"]["title"] == wandb_report.TITLE


@pytest.mark.parametrize(
    ("options", "message"),
    [(["titel=x"], "Did you mean title"), (["paths.results=/nowhere"], "no such folder"), ([], "no record")],
)
def test_what_was_typed_wrong_is_said(options, message, tmp_path, capsys):
    assert wandb_report.main([*([] if options else [f"paths.results={tmp_path}"]), *options]) == 2
    assert message in capsys.readouterr().err
