"""Training on texts that a model has just written: what sequence-level distillation, GKD and MiniLLM share."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from methods.examples import Batch, Example
from methods.training import TrainingSettings, language_modeling_loss, train, weighted_mean

if TYPE_CHECKING:
    from harness.method import Bench
    from methods.distillation.sampling import Responses


def start_warm(module: nn.Module, data: Sequence[Example], settings: TrainingSettings, bench: Bench) -> None:
    """Language modelling on the responses of the data: a student learns to write before it learns from what it writes.

    The papers start from students that were fine-tuned on the data; a model that has just lost layers babbles.
    """
    early = replace(bench, scratch=bench.scratch / "warm-start")
    train(module, list(module.parameters()), data, language_modeling_loss, settings, early, "warm start")


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
