"""MiniLLM: a student minimises the reverse KL of whole responses by policy gradients (Gu et al. 2023).

https://arxiv.org/abs/2306.08543, "MiniLLM: Knowledge Distillation of Large Language Models", Section 2.2. With q the
student and p the teacher, ∇KL(q‖p) of responses falls into a part of single steps, whose gradient is computed over the
whole vocabulary, and a long-term part, which weighs what was written by what came of it. Responses are drawn from a
mixture of teacher and student, and weighted for it; what comes later is averaged over the tokens that are left; text
of pre-training is read beside (Algorithm 1).

The authors' code is another algorithm of the same aim: rounds of responses, each read several times with clipped
probability ratios (PPO), the single-step part beside. Both are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from harness.environment import process_rank, training_processes
from harness.errors import ConfigError
from methods.distillation.divergences import (
    Divergence,
    cross_entropy,
    same_vocabulary,
    token_log_probabilities,
)
from methods.distillation.on_policy import (
    WarmStart,
    first_learned,
    learned,
    logits_from,
    read_examples,
    require_whole_model,
    response_mean,
    targets_from,
    trained_student,
    with_responses,
)
from methods.distillation.sampling import Sampling, end_marks, sample, uniform_numbers
from methods.examples import Batch, Example
from methods.training import TrainingSettings

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from methods.distillation.students import Student
    from methods.examples import TextSource

REVERSE_KL = Divergence("reverse_kl")


@dataclass(frozen=True)
class ReadText:
    """Language modelling beside the policy gradient, so that the student forgets nothing; paper, Section 2.2.

    weight: of its loss; 0 reads none. kd_share: of cross-entropy from the teacher's distribution in it, the rest is
        negative log-likelihood: 0 in the paper, 0.5 in the authors' code.
    samples, tokens: windows of the calibration text; each pass reads as many as it has responses.
    """

    weight: float = 1.0
    kd_share: float = 0.0
    samples: int = 256
    tokens: int = 512

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ConfigError(f"text.weight={self.weight}: must not be negative")
        if not 0 <= self.kd_share <= 1:
            raise ConfigError(f"text.kd_share={self.kd_share}: must lie between 0 and 1")
        if self.samples < 1 or self.tokens < 2:
            raise ConfigError(f"text.samples={self.samples}, text.tokens={self.tokens}: must be at least 1 and 2")

    def windows(self, lm: LanguageModel, bench: Bench) -> Tensor | None:
        """The text as ids [samples, tokens]; None where none is read."""
        if not self.weight:
            return None
        return bench.corpus.training_windows(lm.tokenizer, bench.generator, self.samples, self.tokens)


@dataclass(frozen=True)
class PaperUpdate:
    """A step of Algorithm 1: new responses for every batch.

    long_term: whether the part of what comes later is there; without it this is on-policy reverse KL.
    length_normalisation: what comes later is divided by how many tokens are left.
    """

    long_term: bool = True
    length_normalisation: bool = True


@dataclass(frozen=True)
class OfficialUpdate:
    """A round of the authors' code: many responses, read several times.

    rollouts: responses in a round, over all processes. epochs: how often a round is read.
    clip: ε; ratios of new to old probability, importance included, are clipped to 1 ± ε. discount: γ of later rewards.
    reward_scale, reward_limit: rewards are divided by the first and cut at the second.
    whiten: advantages of a round get mean 0 and variance 1.
    """

    rollouts: int = 256
    epochs: int = 4
    clip: float = 0.2
    discount: float = 0.95
    reward_scale: float = 0.5
    reward_limit: float = 100.0
    whiten: bool = True

    def __post_init__(self) -> None:
        for name in ("rollouts", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"official.{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.clip < 1:
            raise ConfigError(f"official.clip={self.clip}: must lie between 0 and 1")
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"official.discount={self.discount}: must lie between 0 and 1")
        for name in ("reward_scale", "reward_limit"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"official.{name}={getattr(self, name)}: must be greater than 0")


@dataclass(frozen=True)
class MiniLLM:
    """Reverse KL of responses by policy gradients.

    student: what learns. examples: where prompts are from; their responses are for the warm start alone.
    warm_start: language modelling first, in the same steps.
    variant: "paper" or "official" (the authors' code); `paper` and `official` are what either needs.
    teacher_share: α of the mixture αp + (1-α)q that responses are drawn from.
    text: language modelling beside.
    """

    student: Student
    examples: TextSource
    sampling: Sampling
    training: TrainingSettings
    warm_start: WarmStart
    text: ReadText
    variant: Literal["paper", "official"] = "paper"
    teacher_share: float = 0.2
    paper: PaperUpdate = field(default_factory=PaperUpdate)
    official: OfficialUpdate = field(default_factory=OfficialUpdate)

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "official"):
            raise ConfigError(f"method.variant={self.variant}: choose paper or official")
        if not 0 <= self.teacher_share <= 1:
            raise ConfigError(f"method.teacher_share={self.teacher_share}: must lie between 0 and 1")
        if self.sampling.temperature != 1 or self.sampling.top_p != 1:
            raise ConfigError(
                f"method.sampling.temperature={self.sampling.temperature}, top_p={self.sampling.top_p}: must be 1, for "
                "the gradient is an expectation over what the models themselves would write"
            )
        if self.variant == "official":
            self.steps_per_round  # noqa: B018 checks that a round is whole steps

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps on one round of the authors' code."""
        texts = self.training.batch_size * self.training.gradient_accumulation * training_processes()
        steps, left = divmod(self.official.rollouts, texts)
        if left or not steps:
            raise ConfigError(
                f"method.official.rollouts={self.official.rollouts}: must be a multiple of the {texts} responses of a "
                "step (training.batch_size × gradient_accumulation × processes)"
            )
        return steps * self.official.epochs

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Make a student, warm it up, train it against `base`."""
        require_whole_model("MiniLLM", bench)
        texts = read_examples(self.examples, base, bench, self.sampling)
        windows = self.text.windows(base, bench)
        teaching = Teaching(self, base.module, texts.train, end_marks(base), windows)
        training, update = self.training, {"prepare": teaching.fresh}
        loss = teaching.paper_loss
        if self.variant == "official":
            rounds = Rounds(teaching, bench.generator.initial_seed(), base.module.device)
            loss = teaching.official_loss
            update = {"prepare": rounds.prepare, "after_step": rounds.after_step, "state": [rounds.step]}
            # responses of a round are in no checkpoint: a resumed run must begin with a round to have the same ones
            whole = -(-training.checkpoint_steps // self.steps_per_round) * self.steps_per_round
            training = replace(training, checkpoint_steps=whole)
        made = self.student.make(base, bench)
        student = trained_student(made, texts, self.warm_start, texts.train, loss, training, bench, "MiniLLM", **update)
        if windows is not None:
            early = self.warm_start.settings(training)
            passes = (training.steps - early.steps) * training.gradient_accumulation * training_processes()
            bench.log.tokens += passes * training.batch_size * windows.shape[1]
        return student


@dataclass(frozen=True)
class Teaching:
    """One run's teacher and data, and the losses against it.

    windows: text to read beside [S, L], or None.
    """

    method: MiniLLM
    teacher: nn.Module
    examples: Sequence[Example]
    ends: Sequence[int]
    windows: Tensor | None

    def fresh(self, module: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with responses that teacher and student have just written together, and text beside."""
        method = self.method
        prompts = [self.examples[row].prompt for row in batch.rows.tolist()]
        numbers = uniform_numbers(len(prompts), method.sampling, generator)
        responses = sample(module, prompts, method.sampling, self.ends, numbers, self.teacher, method.teacher_share)
        return self.with_text(with_responses(self.examples, batch, responses), generator)

    def with_text(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with `more["text"]` [B, L], windows drawn at random."""
        if self.windows is None:
            return batch
        chosen = torch.randint(len(self.windows), (len(batch.tokens),), generator=generator)
        return replace(batch, more={**batch.more, "text": self.windows[chosen].to(batch.tokens.device)})

    def paper_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Its gradient is the policy gradient; its value is w KL(q‖p), averaged, and the loss of the text."""
        read = self.read(module, batch)
        values = policy_gradient(read, self.method.paper)
        return response_mean(values, batch) + self.text_loss(module, batch)

    def official_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Clipped ratios times advantages, plus the reverse KL of single steps, plus the loss of the text."""
        read = self.read(module, batch)
        old, advantage = (padded_last(batch.more[key][:, read.first :]) for key in ("old", "advantage"))
        values = clipped_policy(read, old, advantage, self.method.official.clip) + read.single
        return response_mean(values, batch) + self.text_loss(module, batch)

    def read(self, module: nn.Module, batch: Batch) -> Read:
        """What both models say of a batch with responses."""
        first = first_learned(batch)
        with torch.no_grad():
            theirs = logits_from(self.teacher, batch, first)
        own, theirs = same_vocabulary(logits_from(module, batch, first), theirs)
        targets = targets_from(batch, first)
        return Read(
            first=first,
            single=REVERSE_KL(own, theirs),
            student=token_log_probabilities(own, targets),
            teacher=token_log_probabilities(theirs, targets),
            mask=padded_last(batch.response[:, first:]),
            importance=padded_last(batch.more["importance"][:, first:]),
        )

    def text_loss(self, module: nn.Module, batch: Batch) -> Tensor | float:
        """Language modelling on the text beside, by its weight."""
        text = self.method.text
        if "text" not in batch.more:
            return 0.0
        tokens = batch.more["text"]
        own = module(input_ids=tokens, use_cache=False).logits
        values = -token_log_probabilities(own, tokens.roll(-1, 1))
        if text.kd_share:
            with torch.no_grad():
                theirs = self.teacher(input_ids=tokens, use_cache=False).logits
            values = (1 - text.kd_share) * values + text.kd_share * cross_entropy(own, theirs)
        return text.weight * values[:, :-1].mean()


# ------------------------------------------------------------------------------------------------------ the mathematics


@dataclass(frozen=True)
class Read:
    """What two models say of responses; every tensor is [B, K], K columns of predictions from column `first` on.

    single: KL(q‖p) of the next token, nats. student, teacher: log q and log p of the token that was written.
    mask: where a response is. importance: w, how much likelier the student alone would have written it.
    """

    first: int
    single: Tensor
    student: Tensor
    teacher: Tensor
    mask: Tensor
    importance: Tensor

    @property
    def rewards(self) -> Tensor:
        """r = log p - log q, 0 outside responses; a constant to gradients."""
        return ((self.teacher - self.student) * self.mask).detach()


def policy_gradient(read: Read, update: PaperUpdate) -> Tensor:
    """What each token adds to the loss, [B, K]: w (KL(q‖p) - R log q), with R what comes after it.

    Its value is w KL(q‖p): the long-term part has a gradient and no value, because its value would mean nothing.
    """
    values = read.single
    if update.long_term:
        later = reward_to_go(read.rewards, include_own=False)
        if update.length_normalisation:
            # the paper divides by T-t-1; at the last but one token that is 0, and one reward is left as it is
            later = later / (remaining(read.mask) - 2).clamp(min=1)
        values = values - later * (read.student - read.student.detach())
    return read.importance * values


def clipped_policy(read: Read, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """max(-A ρ, -A clip(ρ)), [B, K], with ρ = w q / q_old: importance is in what is clipped (authors' code)."""
    ratio = ((read.student - old) * read.mask).exp() * read.importance
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def advantages(rewards: Tensor, mask: Tensor, update: OfficialUpdate) -> Tensor:
    """Discounted rewards from each token on, own included, by how many tokens are left: [B, K] -> [B, K]."""
    scaled = (rewards / update.reward_scale).clamp(-update.reward_limit, update.reward_limit)
    return reward_to_go(scaled, update.discount) / remaining(mask).clamp(min=1) * mask


def whitened(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of any lengths with the mean taken off and divided by the deviation, both over all their numbers."""
    joined = torch.cat(list(values))
    mean, variance = joined.mean(), joined.var(correction=0)
    return [(value - mean) * torch.rsqrt(variance + 1e-8) for value in values]


def reward_to_go(rewards: Tensor, discount: float = 1.0, include_own: bool = True) -> Tensor:
    """Sum of rewards from each column (or the next) on, later ones by powers of `discount`: [B, K] -> [B, K]."""
    columns = torch.arange(rewards.shape[1], device=rewards.device)
    ahead = columns[:, None] - columns  # [K, K]: how far the row's reward lies ahead of the column
    start = 0 if include_own else 1
    powers = discount ** (ahead - start).clamp(min=0).to(rewards.dtype)
    with torch.autocast(rewards.device.type, enabled=False):  # not in bfloat16 where the models' products are
        return rewards @ powers.masked_fill(ahead < start, 0)


def remaining(mask: Tensor) -> Tensor:
    """How many tokens of the response are left at each of its tokens, itself included: bool [B, K] -> [B, K]."""
    return mask * mask.flip(1).cumsum(1).flip(1)


def padded_last(values: Tensor) -> Tensor:
    """[B, K-1] -> [B, K]: a column of zeros for the prediction of nothing."""
    return torch.nn.functional.pad(values, (0, 1))


# ------------------------------------------------------------------------------------------ rounds of the authors' code


class Rounds:
    """Writes a round of responses when one begins, and deals it out.

    Nothing of a round is kept outside memory: `step` is in checkpoints, checkpoints lie between rounds, and a round is
    written again from the student of its beginning and from the same random numbers.
    """

    def __init__(self, teaching: Teaching, seed: int, device: torch.device) -> None:
        self.teaching, self.method = teaching, teaching.method
        self.step = torch.zeros((), dtype=torch.long, device=device)
        self.passes = 0  # of the present step
        self.number: int | None = None
        self.rows: list[int] = []
        self.written: list[Example] = []
        self.kept: dict[str, list[Tensor]] = {}
        self.order: list[int] = []
        generator = torch.Generator().manual_seed(seed)
        rounds = -(-self.method.training.steps // self.method.steps_per_round)
        available, wanted = len(teaching.examples), rounds * self.method.official.rollouts
        shuffled = [torch.randperm(available, generator=generator) for _ in range(-(-wanted // available))]
        self.prompts = torch.cat(shuffled)[:wanted].view(rounds, -1) if rounds else torch.empty(0, 0)

    def prepare(self, module: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
        """The next part of the round in the place of the batch."""
        number, within = divmod(int(self.step), self.method.steps_per_round)
        if number != self.number:
            self.begin(module, number, generator)
        size = self.method.training.batch_size
        start = (within * self.method.training.gradient_accumulation + self.passes) * size
        self.passes += 1
        return self.teaching.with_text(self.dealt(self.order[start : start + size], batch.tokens.device), generator)

    def after_step(self) -> None:
        """A step is done."""
        self.step += 1
        self.passes = 0

    def begin(self, module: nn.Module, number: int, generator: torch.Generator) -> None:
        """Write the responses of a round, and what the student and the teacher say of them now."""
        method = self.method
        self.number = number
        self.rows = self.prompts[number][process_rank() :: training_processes()].tolist()
        numbers = uniform_numbers(len(self.rows), method.sampling, generator)
        orders = [torch.randperm(len(self.rows), generator=generator) for _ in range(method.official.epochs)]
        self.order = torch.cat(orders).tolist()
        self.written, self.kept = [], {"old": [], "advantage": [], "importance": []}
        for start in range(0, len(self.rows), method.sampling.batch_size):
            part = slice(start, start + method.sampling.batch_size)
            self.write(module, self.rows[part], numbers[part])
        if method.official.whiten:
            self.kept["advantage"] = whitened(self.kept["advantage"])

    def write(self, module: nn.Module, rows: list[int], numbers: Tensor) -> None:
        """Some responses of a round."""
        method, examples = self.method, [self.teaching.examples[row] for row in rows]
        responses = sample(
            module,
            [example.prompt for example in examples],
            method.sampling,
            self.teaching.ends,
            numbers,
            self.teaching.teacher,
            method.teacher_share,
        )
        written = [replace(example, response=ids) for example, ids in zip(examples, responses.lists(), strict=True)]
        batch = Batch.of_examples(written, rows).to(self.step.device)
        importance = torch.ones_like(batch.weights)
        places = learned(written, batch)
        importance[places] = responses.importance[responses.mask]
        read = self.teaching.read(module, replace(batch, more={"importance": importance}))
        advantage = advantages(read.rewards, read.mask, method.official)
        found = {"old": read.student, "advantage": advantage, "importance": read.importance}
        for key, values in found.items():
            inside = values[:, :-1][places[:, read.first :]]
            self.kept[key] += [part.cpu() for part in inside.split(places.sum(1).tolist())]
        self.written += written

    def dealt(self, chosen: list[int], device: torch.device) -> Batch:
        """A batch of some responses of the round, with what was kept of each at its tokens."""
        examples = [self.written[index] for index in chosen]
        batch = Batch.of_examples(examples, [self.rows[index] for index in chosen])
        places, more = learned(examples, batch), {}
        for key, values in self.kept.items():
            more[key] = torch.full_like(batch.weights, 1.0 if key == "importance" else 0.0)
            more[key][places] = torch.cat([values[index] for index in chosen])
        return replace(batch, more=more).to(device)
