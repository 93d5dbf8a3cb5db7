"""What is removed: exact counts, nested masks, optimal sets, ties."""

from __future__ import annotations

import itertools

import pytest
import torch

from harness.errors import ConfigError
from methods.pruning.masks import Pattern, lowest, removed_of

SCORES = torch.rand(12, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.5, 0.7, 0.999])
def test_counts_are_exact(share):
    pattern = Pattern.parse(share)
    assert lowest(SCORES, pattern, "layer").sum() == removed_of(12 * 32, share)
    assert (lowest(SCORES, pattern, "row").sum(1) == removed_of(32, share)).all()


def test_shares_mean_the_decimal_that_was_written():
    assert [removed_of(10, tenth / 10) for tenth in range(1, 10)] == list(range(1, 10))
    assert removed_of(3, 0.34) == 1


@pytest.mark.parametrize("keep_of", ["2:4", "4:8", "1:4"])
def test_every_aligned_run_loses_its_lowest(keep_of):
    pattern = Pattern.parse(keep_of)
    mask = lowest(SCORES, pattern, "row")
    for row, removed in zip(SCORES, mask, strict=True):
        for start in range(0, 32, pattern.of):
            run = range(start, start + pattern.of)
            best = min(itertools.combinations(run, pattern.of - pattern.keep), key=lambda s: float(row[list(s)].sum()))
            assert {j for j in run if removed[j]} == set(best)


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_a_sparser_mask_contains_a_denser_one(scope):
    masks = [lowest(SCORES, Pattern.parse(share), scope) for share in (0.2, 0.5, 0.8)]
    assert (masks[0] <= masks[1]).all()
    assert (masks[1] <= masks[2]).all()


def test_freer_choices_keep_more_score():
    """Every 2:4 mask is a 4:8 mask, every 4:8 mask a mask by rows, every such a mask of the layer."""
    kept = [
        float(SCORES[~lowest(SCORES, Pattern.parse(sparsity), scope)].sum())
        for sparsity, scope in (("2:4", "row"), ("4:8", "row"), (0.5, "row"), (0.5, "layer"))
    ]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


def test_of_equals_the_first_go():
    mask = lowest(torch.ones(2, 8), Pattern.parse(0.5), "row")
    assert torch.equal(mask, torch.tensor([[True] * 4 + [False] * 4] * 2))
    mixed = lowest(torch.tensor([[1.0, 0, 1, 1, 0, 2]]), Pattern.parse(0.5), "row")
    assert torch.equal(mixed, torch.tensor([[True, True, False, False, True, False]]))


@pytest.mark.parametrize("sparsity", [0, 1, -0.5, 1.5, "4:4", "0:4", "5:4", "half", float("nan"), None])
def test_what_cannot_be_removed_is_refused(sparsity):
    with pytest.raises(ConfigError, match=f"sparsity={sparsity}"):
        Pattern.parse(sparsity)


def test_runs_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"up_proj: 30 input channels.*4"):
        Pattern.parse("2:4").check("up_proj", 30)
    Pattern.parse(0.5).check("up_proj", 30)


def test_patterns_read_back_as_they_are_written():
    for text in ("0.5", "2:4", "0.35"):
        assert str(Pattern.parse(text)) == text
        assert Pattern.parse(str(Pattern.parse(text))) == Pattern.parse(text)
