"""Perplexity per word is lm-eval's own, page by page."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_models import context, language_model

from harness import statistics
from harness.errors import RunError
from harness.probes.tasks import definition_of
from harness.probes.word_perplexity import WordPerplexity, pages_of

LINES = [
    "",
    " = Du Fu = ",
    "",
    ' Du Fu was a poet of the Tang , with 1 @,@ 400 poems . He \'s read in the " Sichuan " ( a province ) . ',
    "",
    " = = Early life = = ",
    "",
    f" {'It was a long time ago . ' * 40} ",
    "",
    " = A = ",
    "",
    " The first letter ; a well @-@ known one : see B . ",
]
FILE = "".join(f"{line or ' '}\n" for line in LINES)
ROWS = [f"{line}\n" if line else "" for line in LINES]  # as the hub has them


class Pages:
    name, joiner, evaluation_name = "pages", "\n\n", "pages evaluation"

    def __init__(self, documents):
        self.evaluation = self
        self._documents = documents

    def documents(self, split):
        return self._documents


def reading(folder, documents, dense=None):
    return replace(context(folder, dense=dense), corpus=Pages(documents))


def test_a_file_and_its_rows_on_the_hub_have_the_same_pages():
    pages = pages_of([FILE], "\n\n")
    assert [page.split("\n")[0] for page in pages] == [" = Du Fu = ", " = A = "]
    assert "".join(f"{page}\n" for page in pages) == FILE[2:] + "\n"  # nothing but the blank line before is lost
    assert pages_of(ROWS, "\n\n") == pages
    assert pages_of(["no heading", "another"], "\n\n") == ["no heading", "another"]


def test_it_is_what_lm_eval_computes_with_its_own_model(tmp_path):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml

    lm = language_model()
    found = {m.metric: m for m in WordPerplexity(batch=2).measure(lm, reading(tmp_path, [FILE]))}
    rows = Dataset.from_list([{"page": page} for page in pages_of([FILE], "\n\n")])
    config = load_yaml(definition_of("wikitext")) | {"custom_dataset": lambda **_: {"test": rows}}
    config |= {"training_split": None, "validation_split": None}
    theirs = HFLM(pretrained=lm.module, tokenizer=lm.tokenizer, max_length=512, batch_size=1)
    task = ConfigurableTask(config={key: value for key, value in config.items() if key != "tag"})
    results = evaluate(theirs, {"tasks": {"wikitext": task}}, bootstrap_iters=0)["results"]["wikitext"]
    assert found["word_perplexity"].value == pytest.approx(results["word_perplexity,none"], rel=1e-5)
    assert float(found["word_perplexity"].note.split()[0]) == pytest.approx(results["bits_per_byte,none"], abs=1e-4)


def test_against_dense_the_same_pages_are_paired(tmp_path):
    dense, probe = reading(tmp_path / "dense", [FILE]), WordPerplexity()
    first = {m.metric: m for m in probe.measure(language_model(0), dense)}
    assert "word_perplexity_ratio" not in first
    same, other = (
        {m.metric: m for m in probe.measure(language_model(seed), reading(tmp_path / "x", [FILE], dense.samples))}
        for seed in (0, 1)
    )
    assert same["word_perplexity_ratio"].value == 1
    assert same["word_perplexity_ratio"].interval == (1, 1)
    quotient = other["word_perplexity"].value / first["word_perplexity"].value
    assert other["word_perplexity_ratio"].value == pytest.approx(quotient)
    with pytest.raises(RunError, match="other pages"):
        list(WordPerplexity(pages=1).measure(language_model(), reading(tmp_path / "y", [FILE], dense.samples)))


def test_the_interval_of_a_ratio_is_that_of_a_mean_where_all_weigh_the_same():
    values = np.random.default_rng(0).normal(3, 1, 20)
    assert statistics.ratio_interval(values, np.full(20, 2.0)) == pytest.approx(statistics.student_interval(values / 2))
    assert statistics.ratio_interval([1.0], [2.0]) is None


def test_the_interval_of_a_ratio_covers_it():
    """In 95 of 100 samples of 62 pages whose losses grow with their words."""
    draw, covered = np.random.default_rng(1), 0
    for _ in range(2000):
        words = draw.integers(300, 9000, 62)
        losses = words * draw.normal(3.0, 0.3, 62)
        low, high = statistics.ratio_interval(losses, words)
        covered += low <= 3.0 <= high
    assert 0.93 <= covered / 2000 <= 0.97
