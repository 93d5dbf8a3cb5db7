"""Explanations under a budget: against all subsets, and the laws that every curve of accuracy obeys."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from methods.distillation.interventions import RANKINGS, accuracy, balanced, expected_utility, explained, priority

BUDGETS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def outcomes(seed: int, count: int = 10):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (2, count), generator=generator).bool()


def order(ranking: str, before, after, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    sure = torch.rand(2, len(before), generator=generator)
    return priority(
        ranking,
        before=before.double(),
        after=after.double(),
        confidence=sure[0],
        teacher=sure[1],
        right_before=before,
        right_after=after,
        generator=generator,
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", BUDGETS)
def test_utility_explains_the_best_of_all_subsets(seed, budget):
    """No other ⌊B·N⌋ questions have a greater sum of expected gains."""
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.rand(2, 8, generator=generator)
    gain = expected_utility(before, after)
    mask = explained(gain, budget)
    assert mask.sum() == int(budget * 8 + 1e-9)
    best = max(gain[list(subset)].sum() for subset in combinations(range(8), int(mask.sum())))
    assert gain[mask].sum() == pytest.approx(float(best), abs=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_a_perfect_mental_model_is_the_best_ranking_at_every_budget(seed):
    before, after = outcomes(seed)
    curve = [accuracy(explained(expected_utility(before.float(), after.float()), b), before, after) for b in BUDGETS]
    for ranking in RANKINGS:
        for best, budget in zip(curve, BUDGETS, strict=True):
            assert best >= accuracy(explained(order(ranking, before, after, seed), budget), before, after)
    gains = torch.tensor(curve).diff()
    assert (gains.diff() <= 1e-6).all(), "the curve is not concave"


@pytest.mark.parametrize("ranking", RANKINGS)
def test_ends_of_every_curve_and_nested_sets(ranking):
    before, after = outcomes(3)
    first = order(ranking, before, after)
    masks = [explained(first, budget) for budget in BUDGETS]
    assert accuracy(masks[0], before, after) == pytest.approx(before.float().mean().item())
    assert accuracy(masks[-1], before, after) == pytest.approx(after.float().mean().item())
    for smaller, larger in pairwise(masks):
        assert (larger | ~smaller).all()


def test_accuracy_is_a_mean_of_two_columns():
    before, after = outcomes(7)
    mask = explained(order("random", before, after), 0.4)
    by_hand = [a if m else b for m, b, a in zip(mask.tolist(), before.tolist(), after.tolist(), strict=True)]
    assert accuracy(mask, before, after) == pytest.approx(sum(by_hand) / len(by_hand))


def test_random_explanations_lie_on_the_straight_line_on_average():
    before, after = outcomes(1, count=40)
    ends = before.float().mean(), after.float().mean()
    for budget in BUDGETS:
        found = torch.tensor(
            [accuracy(explained(order("random", before, after, seed), budget), before, after) for seed in range(200)]
        )
        expected = ends[0] + budget * (ends[1] - ends[0])
        assert abs(found.mean() - expected) <= 4 * found.std() / 200**0.5 + 1e-6


def test_a_misaligned_teacher_reverses_the_order():
    before, after = torch.rand(2, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    helped = order("utility", before, after).argsort(descending=True)
    assert helped.tolist() == order("misaligned", before, after).argsort(descending=True).tolist()[::-1]


def test_budgets_count_whole_questions_in_spite_of_rounding():
    assert [int(explained(torch.zeros(5), b).sum()) for b in BUDGETS] == [0, 1, 2, 3, 4, 5]
    assert explained(torch.zeros(4), 0.5).tolist() == [True, True, False, False]  # ties: the earlier ones


def test_demonstrations_are_balanced_over_answers():
    labels = ["yes"] * 6 + ["no"] * 2
    taken = balanced(labels, 4)
    assert sorted(labels[i] for i in taken) == ["no", "no", "yes", "yes"]
    assert [labels[i] for i in balanced(labels, 6)].count("no") == 2  # all there are
    assert len(balanced(labels, 20)) == len(labels)
