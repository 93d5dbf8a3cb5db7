"""The small loop and what survives a kill."""

from __future__ import annotations

import pytest
import torch

from harness.errors import RunError
from harness.method import TrainingLog
from methods.block_training import BlockTensors, minimise

TARGETS = torch.tensor([1.0, 2.0, 6.0])


def fit(rate, epochs=200, start=0.0, point=None):
    x = torch.tensor(start, requires_grad=True)
    found = minimise(
        [{"params": [x], "lr": rate}],
        lambda i: (x - TARGETS[i]).square(),
        3,
        epochs,
        torch.Generator().manual_seed(0),
        "x",
        point,
    )
    return float(x), found


def test_it_finds_the_mean():
    x, found = fit(0.05, epochs=400)
    assert x == pytest.approx(3, abs=0.3)
    assert found.before == pytest.approx(41 / 3)
    assert found.after < 5


def test_training_never_harms():
    x, found = fit(50.0, epochs=1, start=3.0)  # one wild step away from the optimum
    assert x == 3.0
    assert found.after == found.before


def test_a_last_step_into_what_is_no_number_is_taken_back():
    x = torch.tensor(1.0, requires_grad=True)
    found = minimise([{"params": [x], "lr": 5.0}], lambda i: x.sqrt() + x, 1, 1, torch.Generator(), "x")
    assert float(x) == 1.0
    assert found.after == found.before == 2.0


def test_no_epochs_change_nothing():
    assert fit(1.0, epochs=0)[0] == 0.0


def test_one_seed_gives_one_result():
    assert fit(0.1) == fit(0.1)


def test_a_loss_that_is_no_number_is_named():
    x = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(RunError, match=r"block 3.*nan.*learning rate"):
        minimise([{"params": [x], "lr": 1.0}], lambda i: x * torch.nan, 1, 1, torch.Generator(), "block 3")


def test_the_curve_starts_before_training_and_has_a_point_an_epoch():
    seen = []
    fit(0.1, epochs=3, point=lambda step, value: seen.append(step))
    assert seen == [0, 3, 6, 9]


def test_what_was_kept_comes_back_and_the_rest_does_not(tmp_path):
    kept = BlockTensors(tmp_path / "new")
    assert kept.get("0") is None
    kept.put("0", {"a": torch.arange(3.0)})
    assert torch.equal(BlockTensors(tmp_path / "new").get("0")["a"], torch.arange(3.0))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["0.safetensors"]


def test_a_log_goes_on_after_a_kill_and_forgets_a_torn_line(tmp_path):
    file = tmp_path / "curves.jsonl"
    log = TrainingLog(file)
    for step in range(3):
        log.point("loss", step, 1.0 - step)
    with file.open("a") as lines:
        lines.write('["loss", 3, 0.')
    again = TrainingLog(file)
    again.point("loss", 2, 7.0)
    again.point("loss", 3, 8.0)
    assert TrainingLog(file).curves == {"loss": {0: 1.0, 1: 0.0, 2: 7.0, 3: 8.0}}


def test_long_curves_are_thinned_to_the_last_point():
    log = TrainingLog()
    for step in range(1001):
        log.point("loss", step, float(step))
    points = log.thinned(100)["loss"]
    assert len(points) <= 100
    assert points[-1] == [1000, 1000.0]
    assert points == sorted(points)
