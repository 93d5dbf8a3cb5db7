"""How To Train Your (Compressed) Large Language Model: take blocks out, then go on with language modelling.

Jha et al. 2023, https://arxiv.org/abs/2305.14864. The last version calls it LayerCHOP: blocks are removed all at once
and the rest trained on the pre-training objective alone (Section 3); removing them little by little and a distillation
objective are its ablations (Section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import ConfigError
from methods.blocks import decoder_blocks
from methods.distillation.divergences import Divergence
from methods.distillation.students import Pattern, Truncated, settled, truncated
from methods.distillation.white_box import fit
from methods.examples import Batch, TextSource
from methods.training import TrainingSettings, language_modeling_loss, token_losses, weighted_mean

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

Matched = Literal["logits", "hidden", "attention", "embedding"]
MATCHED = ("logits", "hidden", "attention", "embedding")


@dataclass(frozen=True)
class CompressedLLM:
    """Take blocks out in `rungs` goes of equal size and train after each of them.

    keep and pattern: see methods.distillation.students.Truncated.
    objective: "lm", the loss of the text; or "kd", the same plus what is matched with the teacher.
    matched: of the teacher, with objective=kd: "logits" (KL), and the mean squared difference of "hidden" states after
        every block that stayed, of "attention" maps and of the "embedding"; hidden states and embeddings go through
        learned square maps that begin as the identity.
    training: steps of all rungs together.
    """

    examples: TextSource
    training: TrainingSettings
    keep: float = 0.5
    pattern: Pattern = "input"
    objective: Literal["lm", "kd"] = "lm"
    matched: Sequence[Matched] = MATCHED
    rungs: int = 1

    def __post_init__(self) -> None:
        _ = self.student
        if self.objective not in ("lm", "kd"):
            raise ConfigError(f"method.objective={self.objective}: choose lm or kd")
        if unknown := set(self.matched) - set(MATCHED):
            raise ConfigError(f"method.matched={sorted(unknown)}: choose among {', '.join(MATCHED)}")
        if self.rungs < 1:
            raise ConfigError(f"method.rungs={self.rungs}: must be at least 1, all blocks at once")
        if self.training.steps % self.rungs:
            raise ConfigError(
                f"method.rungs={self.rungs}: method.training.steps={self.training.steps} do not divide by it"
            )

    @property
    def student(self) -> Truncated:
        """What is left in the end."""
        return Truncated(self.keep, self.pattern)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Take out, train, and again."""
        texts = self.examples.read(base.tokenizer, bench.corpus, bench.generator)
        count = len(decoder_blocks(base.module)[1])
        rungs = nested(count, self.student.blocks(base, bench), self.rungs)
        steps = self.training.steps // self.rungs
        student, before = base, list(range(count))
        for index, kept in enumerate(rungs):
            student = truncated(student, [before.index(block) for block in kept])
            before = kept
            loss, extra = language_modeling_loss, []
            if self.objective == "kd":
                matching = Matching(student.module, base.module, kept, self.matched)
                loss, extra = matching.loss, list(matching.maps.parameters())
            rung = replace(bench, scratch=bench.scratch / f"rung-{index}")
            settings = replace(self.training, steps=steps)
            what = f"training {len(kept)} of {count} blocks"
            fit(student, texts, loss, settings, rung, what, first_step=index * steps, extra=extra)
        return settled(student)


def nested(count: int, kept: Sequence[int], rungs: int) -> list[list[int]]:
    """Blocks that stay after each of `rungs` goes, every one a subset of the one before, the last one `kept`."""
    gone = [index for index in range(count) if index not in kept]
    cuts = [len(gone) * (rung + 1) // rungs for rung in range(rungs)]
    # a block of every part goes at a time, so that no rung tears a hole that the final model does not have
    order = [gone[index] for start in range(rungs) for index in range(start, len(gone), rungs)]
    return [[index for index in range(count) if index not in order[:cut]] for cut in cuts]


class Matching:
    """The distillation objective: L_LM + KL(p‖q) + Σ‖H_t - H_s W‖² + Σ‖A_t - A_s‖² + ‖E_t - E_s W‖².

    Squared differences are means over their elements, so that none of the terms grows with the width of the model.
    kept: which block of the teacher each block of the student was.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, kept: Sequence[int], matched: Sequence[str]) -> None:
        self.teacher, self.kept, self.matched = teacher, list(kept), set(matched)
        width = student.get_input_embeddings().embedding_dim
        reference = next(student.parameters())
        count = len(kept) * ("hidden" in self.matched) + ("embedding" in self.matched)
        self.maps = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(count)]).to(reference)
        with torch.no_grad():
            for one in self.maps:
                one.weight.copy_(torch.eye(width))
        if "attention" in self.matched:
            for module in (student, teacher):
                module.set_attn_implementation("eager")  # the only one that returns its maps

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """All terms of a batch; a scalar."""
        asked = {
            "input_ids": batch.tokens,
            "attention_mask": batch.attention if batch.padded else None,
            "use_cache": False,
            "output_hidden_states": bool({"hidden", "embedding"} & self.matched),
            "output_attentions": "attention" in self.matched,
        }
        ours = module(**asked)
        with torch.no_grad():
            theirs = self.teacher(**asked)
        values = token_losses(ours.logits, batch)
        if "logits" in self.matched:
            values = values + Divergence("forward_kl")(ours.logits[:, :-1], theirs.logits[:, :-1])
        total = weighted_mean(values, batch)
        maps = iter(self.maps)
        read = batch.attention.bool()
        if "hidden" in self.matched:
            for index, block in enumerate(self.kept):
                mapped = next(maps)(ours.hidden_states[index + 1])
                total = total + F.mse_loss(mapped[read], theirs.hidden_states[block + 1][read])
        if "embedding" in self.matched:
            total = total + F.mse_loss(next(maps)(ours.hidden_states[0])[read], theirs.hidden_states[0][read])
        if "attention" in self.matched:
            for index, block in enumerate(self.kept):
                total = total + F.mse_loss(ours.attentions[index], theirs.attentions[block])
        return total
