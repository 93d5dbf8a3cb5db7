"""What the page is made of: comparisons that mix nothing, losses and costs, rooflines, and text that stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from harness.errors import ConfigError
from harness.records import Measurement, write_record
from harness.report.__main__ import main, parse
from harness.report.axes import AXES, LOSS, axes_of, fronts
from harness.report.data import MOST_STEPS, Found, packed, page_data, read_folders, rounded
from harness.report.page import json_for_script, page, plotting_library
from harness.scaling_plot import points_of
from tests.harness.fake_records import LONG, XEON, collapsed, failed, record, sweep, write_all

HOSTILE = "</script><script>window.hacked=1</script><!--<img src=x onerror=hacked()>\u202e\x1b[31m"


def axis(metric):
    return next(a for a in AXES if a.metric == metric)


# ---------------------------------------------------------------------------------------------- losses and costs


def test_losses_are_drawn_so_that_less_is_better():
    """At 80 % agreement a fifth of the tokens differ; an interval keeps its ends in order when its sign turns."""
    run = replace(
        record("rtn", 4), measurements=[Measurement("top1_agreement", 0.8, "share", "x", "higher", (0.7, 0.9))]
    )
    assert axis("top1_agreement").drawn(run, reference=False) == pytest.approx((20, 10, 30))
    run = replace(run, measurements=[Measurement("perplexity_ratio", 1.25, "×", "x", "lower", (1.2, 1.3))])
    assert axis("perplexity_ratio").drawn(run, reference=False) == pytest.approx((25, 20, 30))


def test_one_timing_is_no_exact_number():
    """10 % of a speed and 30 % of seconds to compress are taken for noise, as in the tables; sizes repeat."""
    times = [Measurement("time_per_output_token_ms", 20.0, "ms", "x", "lower")]
    times += [
        Measurement("compress_seconds", 20.0, "s", "x", "lower"),
        Measurement("stored_bytes", 2e7, "B", "x", "lower"),
    ]
    run = replace(record("rtn", 4), measurements=times)
    assert axis("time_per_output_token_ms").drawn(run, reference=False) == pytest.approx((20, 19, 21))
    assert axis("compress_seconds").drawn(run, reference=False) == pytest.approx((20, 17, 23))
    assert axis("stored_bytes").drawn(run, reference=False) == pytest.approx((20, 20, 20))


def test_dense_loses_nothing_by_definition_and_others_only_what_was_measured():
    dense, other = record("dense"), replace(record("rtn", 4), measurements=[])
    for metric in ("perplexity_ratio", "kl_divergence", "top1_agreement", "accuracy_difference", "flips"):
        assert axis(metric).drawn(dense, reference=True) == (0, 0, 0)
        assert axis(metric).drawn(other, reference=False) is None


def test_each_protocol_and_workload_is_an_axis_of_its_own():
    records = [record("dense"), record("rtn", 4, loss=0.1), record("gptq", 4, loss=0.1, on=LONG)]
    axes = axes_of(records, frozenset((records[0].id,)))
    assert {a.on for a in axes if a.metric == "perplexity_ratio"} == {r.find("perplexity").on for r in records}
    assert {a.on for a in axes if a.metric == "time_per_output_token_ms"} == {
        "batch 1, prompt 128, 32 new",
        "batch 4, prompt 128, 32 new",
    }


def test_what_collapsed_is_never_in_the_front_and_dense_may_be():
    records = [record("dense"), collapsed(record("rtn", 2, loss=3.0)), record("gptq", 4, loss=0.1)]
    records.append(record("rtn", 4, loss=0.5))  # as large as GPTQ and worse
    axes = axes_of(records, frozenset((records[0].id,)))
    pair = (
        next(k for k, a in enumerate(axes) if a.metric == "perplexity_ratio"),
        next(k for k, a in enumerate(axes) if a.metric == "stored_bytes"),
    )
    found = fronts(records, axes, frozenset((records[0].id,)), frozenset((records[1].id,)))
    assert found[pair] == [0, 2]
    assert set(found) == {(a, b) for a, x in enumerate(axes) for b, y in enumerate(axes) if x.kind == LOSS != y.kind}


# ---------------------------------------------------------------------------------------------- comparisons


def test_no_comparison_mixes_machines_models_or_protocols():
    records = sweep() + sweep(machine=XEON) + sweep(on=LONG) + sweep(model="other")
    data = page_data(Found({"": records}))
    assert len(data["comparisons"]) == 4
    assert sum(c["count"] for c in data["comparisons"]) == len(data["runs"]) == len(records)
    texts = data["shared"]
    for comparison in data["comparisons"]:
        runs = data["runs"][comparison["first"] :][: comparison["count"]]
        assert len({json.dumps(texts[run["config"]["model"]]) for run in runs}) == 1
        assert len({json.dumps(texts[run["environment"]["machine"]]) for run in runs}) == 1
        on = {texts[m[1]] for run in runs for m in run["measurements"] if texts[m[0]] == "perplexity"}
        assert len(on) == 1
        assert len(comparison["table"]["rows"]) == comparison["count"]
        members = range(comparison["first"], comparison["first"] + comparison["count"])
        assert all(place in members for front in comparison["fronts"].values() for place in front)
    same = [c for c in data["comparisons"] if c["title"] == data["comparisons"][0]["title"]]
    assert len({c["apart"] for c in same}) == len(same) == 2  # two protocols of one machine are told apart


def test_rows_of_the_table_are_the_runs_in_order():
    data = page_data(Found({"": sweep()}))
    (comparison,) = data["comparisons"]
    for run, cells in zip(data["runs"], comparison["table"]["rows"], strict=True):
        assert cells[0][0].removesuffix(", failed").startswith(run["title"])
        assert (cells[1][0] if cells[1] else "") == run.get("bits", "")


def test_a_failed_run_keeps_its_stage_and_reason():
    data = page_data(Found({"": [record("dense"), failed(record("awq", 3), "out of memory", "compress")]}))
    assert [run["failed"] for run in data["runs"] if "failed" in run] == [["compress", "out of memory"]]


def test_scaling_shows_what_the_scaling_plot_shows_one_protocol_at_a_time():
    def data_type(bits, on):
        card = {"taxonomy": "quantization/data_types"}
        return record("nf4", bits, loss=1 / bits, on=on, card=card)

    here, there = ([data_type(bits, on) for bits in (3, 4, 8)] for on in ("near", "far"))
    laws = [law for law in page_data(Found({"": here + there}))["scaling"] if law["metric"] == "perplexity"]
    assert [[point[4] for point in law["points"]] for law in laws] == [
        [rounded(point.value) for point in points_of(runs, "perplexity")[0]] for runs in (here, there)
    ]


# ---------------------------------------------------------------------------------------------- latency, layers, curves


def test_the_roofline_is_the_least_time_that_the_bytes_allow():
    """Half of the roofline's speed at 10 ms means 5 ms; 1500 MiB and a cache of 500 MiB at 100 GB/s take 21 ms.

    The cache of 4 × (128 + 16) tokens that the roofline read is not read here, and neither is what it did not read of
    all weights in memory: the table of words.
    """
    batch, context = "batch 4, prompt 128, 32 new, bfloat16", "batch 1, context 512, 8 new, bfloat16"
    measurements = [
        Measurement("time_per_output_token_ms", 10.0, "ms", batch, "lower", (9.0, 12.0)),
        Measurement(
            "decode_roofline_fraction", 0.5, "share", batch, "higher", None, "2076 MiB a step at 100.0 GB/s: at …"
        ),
        Measurement("loaded_weight_bytes", 1.9e9, "bytes", "ready", "lower"),
        Measurement("kv_cache_bytes_per_token", 2**20, "bytes", "one sequence", "lower"),
        Measurement("context_output_token_ms", 40.0, "ms", context, "lower"),
        Measurement("context_cache_bytes", 500 * 2**20, "bytes", context, "lower"),
    ]
    (run,) = page_data(Found({"": [replace(record("rtn", 4), measurements=measurements)]}))["runs"]
    assert run["batches"] == [["prompt 128, 32 new, bfloat16", 4, 10, 9, 12, 5]]
    assert run["contexts"] == [["batch 1, 8 new, bfloat16", 512, 40, 40, 40, 20.9715]]


def test_packed_numbers_are_within_an_eighth_of_a_percent():
    values = [1e-12, 3.3e-7, 0.0123, 1.0, 7.5e9]
    codes = np.frombuffer(base64.b64decode(packed([*values, 0.0, None])), dtype="<u2")
    assert 10 ** (codes[:5] / 1000 - 12) == pytest.approx(values, rel=0.00125)
    assert codes[5:].tolist() == [0, 65535]


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path):
    curve = [[step, math.exp(-step / 400)] for step in range(1000)]
    write_all([replace(record("gptq", 4), curves={"loss": curve}), record("dense")], tmp_path)
    found = read_folders(tmp_path)
    (thin,) = (run.curves["loss"] for run in found.folders[""] if run.curves)
    assert thin[0] == curve[0]
    assert thin[-1] == curve[-1]
    assert MOST_STEPS / 2 < len(thin) <= MOST_STEPS + 1


# ---------------------------------------------------------------------------------------------- reading


def test_folders_below_are_read_and_published_ones_only_where_named(tmp_path):
    write_all(sweep(), tmp_path)
    write_all(sweep(machine=XEON)[:2], tmp_path / "kernels")
    write_all(sweep(on=LONG)[:3], tmp_path / "published" / "h100")
    broken = tmp_path / "records" / "model" / "torn.json"
    broken.write_text("{", encoding="utf-8")
    errors = replace(record("rtn", 8), layer_errors={"model.layers.0.q": 0.5})
    write_record(errors, tmp_path / "records" / "model" / "errors.json")
    found = read_folders(tmp_path)
    assert {folder: len(records) for folder, records in found.folders.items()} == {"": 8, "kernels": 2}
    assert list(found.layers) == [("", errors.id)]
    assert "torn.json" in found.broken[0]
    assert {f: len(r) for f, r in read_folders(tmp_path / "published").folders.items()} == {"h100": 3}


def test_nothing_to_read_is_said_with_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match="published"):
        read_folders(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        read_folders(tmp_path / "absent")


def test_options_are_named_and_near_misses_answered():
    assert parse(["paths.results=DIR", "output=a=b"]) == {"paths.results": "DIR", "output": "a=b"}
    with pytest.raises(ConfigError, match=r"Did you mean paths\.results"):
        parse(["path.results=DIR"])
    with pytest.raises(ConfigError, match="OPTION=VALUE"):
        parse(["published"])


def test_a_page_that_cannot_be_written_is_said_with_the_way_out(tmp_path, capsys):
    write_all([record("dense"), record("gptq", 4)], tmp_path)
    assert main([f"paths.results={tmp_path}", "output=/dev/null/page.html"]) == 2
    assert "output=FILE writes the page elsewhere" in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    heavy = "{'numpy', 'torch', 'pandas'} & set(sys.modules)"
    code = f"import sys, harness.report.__main__ as m; m.main(['--help']); print({heavy})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.endswith("set()\n")
    assert "paths.results=DIR" in answer.stdout


# ---------------------------------------------------------------------------------------------- the page


class Elements(HTMLParser):
    """Every tag with its attributes, and the text of every script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.within = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.within = tag == "script"
        self.scripts += [""] if self.within else []

    def handle_endtag(self, tag):
        self.within = False

    def handle_data(self, data):
        if self.within:
            self.scripts[-1] += data


def hostile_records():
    """A name that would end a script, as the model, the method, a failure, a setting, a curve, a note and a command."""
    run = record("rtn", 4, loss=0.1, model=HOSTILE, method={"path": HOSTILE}, card={"title": HOSTILE, "name": HOSTILE})
    run = replace(run, command=f"python -m harness model='{HOSTILE}'", curves={HOSTILE: [[0, 3.0], [1, 2.0], [2, 1.0]]})
    gap = Measurement("accuracy", None, "share", HOSTILE, "higher", note=HOSTILE)
    return [
        record("dense", model=HOSTILE),
        replace(run, measurements=[*run.measurements, gap]),
        failed(record("gptq", 4, model=HOSTILE), HOSTILE, HOSTILE),
    ]


def test_a_hostile_name_stays_text_and_only_our_scripts_may_run():
    data = page_data(Found({HOSTILE: hostile_records()}, broken=[HOSTILE]))
    html = page(data, f"python -m harness.report model={HOSTILE}", "window.vegaEmbed = 1;").decode()
    found = Elements(html)
    assert [attributes.get("type") for tag, attributes in found.tags if tag == "script"] == [
        "application/json", "module", "module", "module",
    ]  # fmt: skip
    assert not [tag for tag, _ in found.tags if tag == "img"]
    assert json.loads(found.scripts[0]) == json.loads(json.dumps(data))
    assert "\u202e" not in html
    assert "\x1b" not in html
    policy = next(attributes["content"] for tag, attributes in found.tags if "http-equiv" in attributes)
    digests = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in found.scripts[1:]}
    assert set(re.findall(r"sha256-([^']+)", policy)) == digests
    assert "default-src 'none'" in policy


def test_the_plotting_library_is_bundled_once_and_is_the_same_where_nothing_can_be_kept(tmp_path, monkeypatch):
    bundled = []
    library = SimpleNamespace(__version__="1", javascript_bundle=lambda: bundled.append(1) or "a\r\n'</script'")
    monkeypatch.setitem(sys.modules, "vl_convert", library)
    for cache, times in ((tmp_path, 1), (tmp_path, 1), (os.devnull, 2)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        assert plotting_library().endswith("*/\na\r\n'<\\/script'")
        assert len(bundled) == times


def test_json_in_a_script_has_no_tag_and_is_the_same_json():
    assert "<" not in json_for_script({"a": HOSTILE})
    assert json.loads(json_for_script({"a": HOSTILE})) == {"a": HOSTILE}


def test_what_is_no_number_or_no_command_stops_no_page(tmp_path):
    """A loss that became NaN is null in the record; a setting may be infinite, a quotation may not end."""
    run = record("gptq", 4, method={"limit": math.inf})
    curve = [[0, 3.0], [1, None], [2, 2.0], [3, 1.0]]
    errors = {"model.layers.0.q": None, "model.layers.1.q": 0.5}
    odd = {"curves": {"loss": curve}, "layer_errors": errors, "layer_output_errors": {}, "command": "python 'quoted"}
    write_all([record("dense"), replace(run, **odd)], tmp_path)
    data = page_data(read_folders(tmp_path))
    assert [run["curves"]["loss"] for run in data["runs"] if "curves" in run] == [[[0, 3], [2, 2], [3, 1]]]
    assert json.loads(json_for_script(data)) == json.loads(json.dumps(data))


def test_a_page_is_the_same_whenever_it_is_made():
    records = sweep()
    one, two = (page(page_data(Found({"": list(order)})), "c", "") for order in (records, reversed(records)))
    assert one == two
