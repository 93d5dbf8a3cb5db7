"""Perplexity per word, as lm-evaluation-harness's task `wikitext` has it: a number that other tokenizers can share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from harness import statistics
from harness.errors import ConfigError, RunError
from harness.probes.perplexity import COLLAPSED
from harness.records import Measurement

if TYPE_CHECKING:
    import pandas as pd

    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel

OUTCOMES = "word-perplexity.parquet"


@dataclass(frozen=True)
class WordPerplexity:
    """exp(-log-likelihood of all pages / their words), protocol `lm-eval-word` (lm-eval's `wikitext`, version 2).

    Every page is undone of WikiText's spacing and read alone, from the end-of-text mark on, in windows as long as the
    model allows, each predicting every token of its own once. Words are those of the page as it was written. lm-eval
    takes the pages from a data set of the hub; here they are cut out of the evaluation text at its headings, and a
    text without headings is one page for every document.

    pages: only so many from the start of the text; None takes all. batch: windows read at once.
    """

    pages: int | None = None
    batch: int = 4

    stage: ClassVar[Stage] = "evaluate"
    compares: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"hidden states"})

    def __post_init__(self) -> None:
        for field in ("pages", "batch"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"word_perplexity {field}={value}: must be at least 1")

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """Perplexity per word, with bits per byte in its note; against the dense run also their ratio."""
        text = context.corpus.evaluation
        pages = pages_of(text.documents("evaluation"), text.joiner)[: self.pages]
        outcomes, window = self._outcomes(lm, context, pages)
        context.samples.mkdir(parents=True, exist_ok=True)
        outcomes.to_parquet(context.samples / OUTCOMES, index=False)
        on = f"{context.corpus.evaluation_name}, lm-eval-word, {len(pages)} pages, windows of {window}"
        losses, words = outcomes["loss"].to_numpy(), outcomes["words"].to_numpy()
        dense = None if context.reference is None else self._dense(context, outcomes)
        mean = losses.sum() / words.sum()
        gap = None if dense is None else (losses - dense).sum() / words.sum()
        note = f"{losses.sum() / log(2) / outcomes['bytes'].sum():.4f} bits per byte"
        if gap is not None and not gap <= log(COLLAPSED):
            note = f"collapsed; {note}"
        interval = _exponents(statistics.ratio_interval(losses, words))
        yield Measurement("word_perplexity", float(np.exp(mean)), "ppl/word", on, "lower", interval, note)
        if dense is not None:
            interval = _exponents(statistics.ratio_interval(losses - dense, words))
            yield Measurement("word_perplexity_ratio", float(np.exp(gap)), "× dense", on, "lower", interval)

    def _outcomes(self, lm: LanguageModel, context: Context, pages: Sequence[str]) -> tuple[pd.DataFrame, int]:
        """Of every page its loss in nats, its words and its bytes; and the longest window."""
        import pandas as pd
        from lm_eval.api.instance import Instance
        from lm_eval.tasks._yaml_loader import _import_func_in_yml

        from harness.engines.lm_eval import EngineLM
        from harness.probes.tasks import definition_of

        folder = definition_of("wikitext").parent
        undone = _import_func_in_yml("preprocess_wikitext.wikitext_detokenizer", folder)
        counted = _import_func_in_yml("preprocess_wikitext.process_results", folder)
        reader = EngineLM(lm, self.batch, context.progress)
        requests = [
            Instance("loglikelihood_rolling", {"page": page}, (undone({"page": page}),), number)
            for number, page in enumerate(pages)
        ]
        rows = []
        for request, likelihood in zip(requests, reader.loglikelihood_rolling(requests), strict=True):
            results = counted(request.doc, (likelihood,))
            rows.append((-likelihood, results["word_perplexity"][1], results["byte_perplexity"][1]))
        return pd.DataFrame(rows, columns=["loss", "words", "bytes"]), reader.max_length

    def _dense(self, context: Context, outcomes: pd.DataFrame) -> np.ndarray:
        """The dense run's losses of the very pages."""
        import pandas as pd

        path = context.reference / OUTCOMES
        if not path.is_file():
            raise RunError(f"{path.name}: the dense run kept no pages; run it again (method=dense force=true)")
        dense = pd.read_parquet(path)
        if dense[["words", "bytes"]].to_numpy().tolist() != outcomes[["words", "bytes"]].to_numpy().tolist():
            raise RunError(f"{path}: the dense run read other pages; run it again (method=dense force=true)")
        return dense["loss"].to_numpy()


def pages_of(documents: Sequence[str], joiner: str) -> list[str]:
    """The pages of a text: from one heading of WikiText's first level, " = Title = ", to the next, or its documents.

    Rows that the hub has of WikiText are lines of the official file, the blank ones emptied.
    """
    lines = all(text.endswith("\n") or not text for text in documents)
    whole = "".join(text or " \n" for text in documents) if lines else joiner.join(documents)
    pages: list[list[str]] = [[]]
    for line in whole.split("\n"):
        if re.fullmatch(r"= [^=].*[^=] =|= [^=] =", line.strip()):
            pages.append([])
        pages[-1].append(line)
    if len(pages) == 1:
        pages = [[text] for text in documents]
    return [page for page in map("\n".join, pages) if page.strip()]


def _exponents(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if interval is None else (float(np.exp(interval[0])), float(np.exp(interval[1])))
