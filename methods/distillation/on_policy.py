"""Training on texts that a model has just written: what sequence-level distillation, GKD and MiniLLM share."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from methods import sharding
from methods.distillation.sampling import Responses, Sampling, check_length, padded_on_the_left
from methods.distillation.students import settled
from methods.distillation.white_box import fit
from methods.examples import Batch, Example, Texts
from methods.training import Loss, TrainingSettings, language_modeling_loss, weighted_mean

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from methods.examples import TextSource


@dataclass(frozen=True)
class WarmStart:
    """Language modelling first: a student learns to write before it learns from what it writes.

    The papers start from students that were fine-tuned on the data; one that has just lost layers babbles.
    share: of all steps that go into it; the rest is distillation. learning_rate, batch_size, gradient_accumulation: of
        these steps. examples: what they read; None: the examples of the method.
    """

    share: float
    learning_rate: float
    batch_size: int
    gradient_accumulation: int = 1
    examples: TextSource | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(f"warm_start.share={self.share}: must be at least 0 (none) and less than 1")
        self.settings(TrainingSettings(0, 0.0))

    def settings(self, training: TrainingSettings) -> TrainingSettings:
        """Those of the warm start, where all steps together are those of `training`."""
        return replace(
            training,
            steps=round(self.share * training.steps),
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
        )


def read_examples(source: TextSource, lm: LanguageModel, bench: Bench, sampling: Sampling) -> Texts:
    """Texts with prompts that can be continued.

    Raises ConfigError for a source of plain windows, and RunError for an empty prompt or one too long for the model.
    """
    texts = source.read(lm.tokenizer, bench.corpus, bench.generator)
    if isinstance(texts.train, Tensor):
        raise ConfigError(
            "method.examples gives plain windows of text, but responses are written to prompts: use "
            "examples@method.examples=continuations, or =file"
        )
    prompts, _ = padded_on_the_left([example.prompt for example in texts.train], 0)
    check_length(lm.module, prompts.shape[1] + sampling.new_tokens)
    return texts


def require_whole_model(what: str, bench: Bench) -> None:
    """Raise ConfigError where the trained model is sharded: a process alone could not write with its part."""
    if bench.sharded:
        sharding.check(what, writing=True)


def warmed_up(
    student: LanguageModel, texts: Texts, warm_start: WarmStart, training: TrainingSettings, bench: Bench, what: str
) -> TrainingSettings:
    """Warm up a student, in place; what is left of the steps of `training`."""
    early = warm_start.settings(training)
    if early.steps:
        if warm_start.examples is not None:
            own = warm_start.examples.read(student.tokenizer, bench.corpus, bench.generator)
            texts = Texts(own.train, texts.held_out)  # one curve of held-out loss, on one set of texts
        first = replace(bench, scratch=bench.scratch / "warm-start")
        fit(student, texts, language_modeling_loss, early, first, f"{what}: warm start")
    return replace(training, steps=training.steps - early.steps)


def trained_student(
    student: LanguageModel,
    texts: Texts,
    warm_start: WarmStart,
    data: Sequence[Example],
    loss: Loss,
    training: TrainingSettings,
    bench: Bench,
    what: str,
    **more: Any,
) -> LanguageModel:
    """Warm up a student, then train it by `loss` on `data`; `more` goes to `train`. Both parts are on one curve."""
    late = warmed_up(student, texts, warm_start, training, bench, what)
    fit(student, Texts(data, texts.held_out), loss, late, bench, what, first_step=training.steps - late.steps, **more)
    return settled(student)


def with_responses(examples: Sequence[Example], batch: Batch, responses: Responses) -> Batch:
    """The batch with what was written after each prompt in the place of the responses that it had.

    Its `more["importance"]` is `responses.importance`, [B, T-1], 1 outside responses.
    """
    rows = batch.rows.tolist()
    written = [replace(examples[row], response=response) for row, response in zip(rows, responses.lists(), strict=True)]
    made = Batch.of_examples(written, rows).to(batch.tokens.device)
    importance = torch.ones_like(made.weights)
    importance[learned(written, made)] = responses.importance[responses.mask]
    return replace(made, more={**batch.more, "importance": importance})


def learned(examples: Sequence[Example], batch: Batch) -> Tensor:
    """Which predictions are of responses, bool [B, T-1]; row by row, in the order of the responses' tokens."""
    starts = torch.tensor([max(len(example.prompt) - 1, 0) for example in examples], device=batch.tokens.device)
    ends = batch.attention.sum(1) - 1
    columns = torch.arange(batch.weights.shape[1], device=batch.tokens.device)
    return (columns >= starts[:, None]) & (columns < ends[:, None])


def first_learned(batch: Batch) -> int:
    """The first column of [B, T-1] in which a prediction is learned."""
    return int(batch.response.any(0).int().argmax())


def logits_from(module: nn.Module, batch: Batch, first: int) -> Tensor:
    """Logits from column `first` to the end, [B, T - first, V]: those of prompts are never computed.

    The last column predicts nothing of the batch; it stays, because leaving it out would copy all others.
    """
    kept = batch.tokens.shape[1] - first
    told = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}
    mask = batch.attention if batch.padded else None
    output = module(input_ids=batch.tokens, attention_mask=mask, use_cache=False, **told)
    return output.logits[:, -kept:]


def targets_from(batch: Batch, first: int) -> Tensor:
    """What the columns of `logits_from` predict: ids [B, T - first], the last of which mean nothing."""
    return batch.tokens.roll(-1, 1)[:, first:]


def response_mean(values: Tensor, batch: Batch) -> Tensor:
    """Mean by the weights of the batch of values [B, T - first], one for each column of `logits_from`; a scalar."""
    first = batch.tokens.shape[1] - values.shape[1]
    return weighted_mean(values[:, :-1], replace(batch, weights=batch.weights[:, first:]))
