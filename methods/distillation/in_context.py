"""In-context learning distillation: a student learns to read examples as a larger model does (Huang et al. 2022).

https://arxiv.org/abs/2212.10670, Section 3. A text is a few labelled examples of a task and a question of it. The
student learns the answer and the teacher's distribution over it (in-context objective), and the text itself and the
teacher's distributions over it (language-modelling objective). Meta-ICT teaches on other tasks than those asked;
Multitask-ICT on the few labelled examples of the very tasks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from harness.decoding import batches, complete, encode, padded
from harness.errors import ConfigError, RunError
from methods.distillation.divergences import Divergence
from methods.distillation.students import settled
from methods.distillation.teachers import InMemory
from methods.examples import Batch, Example, tokenized
from methods.training import logits_of, token_losses, train, weighted_mean

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel, Progress
    from harness.problems import Problem
    from harness.task_pools import TaskPools
    from methods.distillation.students import Student
    from methods.distillation.teachers import Teacher
    from methods.training import TrainingSettings

FORWARD_KL = Divergence("forward_kl")


@dataclass(frozen=True)
class Episode:
    """Labelled examples of a task, and a question of it that is not among them."""

    examples: tuple[Problem, ...]
    question: Problem


@dataclass(frozen=True)
class InContext:
    """Questions after labelled examples of their task; the label that most sets of examples vote for.

    problems: where examples come from. example, question: how each is written; {question} and {answer}.
    space: what an answer begins with: tokenizers have words with the space before them.
    shots: examples in a text. sets: how many texts, with examples of their own, vote on a question.
    new_tokens: the most in an answer of a task without labels to choose from.
    """

    problems: TaskPools
    example: str = "{question}\nLabel:{answer}\n\n"
    question: str = "{question}\nLabel:"
    space: str = " "
    shots: int = 4
    sets: int = 5
    new_tokens: int = 24
    batch: int = 16
    seed: int = 0

    calculator: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, key in (("example", "{question}"), ("example", "{answer}"), ("question", "{question}")):
            if key not in getattr(self, name):
                raise ConfigError(f"decoding.{name}={getattr(self, name)!r}: must hold {key}")
        for name, least in (("shots", 0), ("sets", 1), ("new_tokens", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"decoding.{name}={getattr(self, name)}: must be at least {least}")

    def decode(self, lm: LanguageModel, problems: Sequence[Problem], progress: Progress) -> list[str]:
        """See Decoding. Raises RunError for a question of a task without examples."""
        pools = self.problems.examples("test")
        prompts, rows = [], []
        for row, problem in enumerate(problems):
            pool = pools.get(self.problems.task_of(problem))
            if not pool:
                raise RunError(f"{problem.question[:60]!r}: its task has no examples; choose problems of tasks")
            for number in range(self.sets):
                draw = random.Random(f"{self.seed} {problem.id} {number}")
                prompts.append(self.prompt(drawn(pool, problem, self.shots, draw)))
                rows.append(row)
        answers: list[list[tuple[str, float]]] = [[] for _ in problems]
        choosing = [place for place, row in enumerate(rows) if problems[row].choices]
        writing = [place for place, row in enumerate(rows) if not problems[row].choices]
        labels = [problems[rows[place]].choices for place in choosing]
        for place, best in zip(
            choosing, self._likeliest(lm, [prompts[p] for p in choosing], labels, progress), strict=True
        ):
            answers[rows[place]].append(best)
        texts = complete(lm, [prompts[p] for p in writing], self.new_tokens, ("\n",), self.batch, progress)
        for place, text in zip(writing, texts, strict=True):
            answers[rows[place]].append((text.strip(), 0.0))
        return [vote(own) for own in answers]

    def describe(self) -> str:
        """See Decoding."""
        return f"{self.shots} labelled examples of the task, vote of {self.sets} such sets"

    def prompt(self, episode: Episode) -> str:
        """Examples, then the question; its answer follows."""
        shown = "".join(
            self.example.format(question=each.question, answer=self.space + each.gold) for each in episode.examples
        )
        return shown + self.question.format(question=episode.question.question)

    def _likeliest(
        self, lm: LanguageModel, prompts: Sequence[str], labels: Sequence[Sequence[str]], progress: Progress
    ) -> list[tuple[str, float]]:
        """Of each prompt's labels the one with the greatest mean log-probability per token, and that."""
        asked = [(row, label) for row, own in enumerate(labels) for label in own]
        pairs = [
            (encode(lm, prompts[row], 1), lm.tokenizer(self.space + label, add_special_tokens=False)["input_ids"])
            for row, label in asked
        ]
        scores = [0.0] * len(pairs)
        lengths = [len(first) + len(second) for first, second in pairs]
        for some in batches(lengths, self.batch, progress, "labels"):
            losses = lm.engine.score(padded([[*pairs[i][0], *pairs[i][1]] for i in some], left=False)[0])
            for place, index in enumerate(some):
                scores[index] = -float(losses[place, len(pairs[index][0]) - 1 : lengths[index] - 1].mean())
        best: list[tuple[str, float]] = [("", -torch.inf)] * len(prompts)
        for (row, label), score in zip(asked, scores, strict=True):
            if score > best[row][1]:
                best[row] = (label, score)
        return best


def vote(answers: Sequence[tuple[str, float]]) -> str:
    """The answer given most often; among equals the one with the greatest sum of scores."""
    tally: dict[str, tuple[int, float]] = {}
    for answer, score in answers:
        count, total = tally.get(answer, (0, 0.0))
        tally[answer] = (count + 1, total + score)
    return max(sorted(tally), key=lambda answer: tally[answer])


def drawn(pool: Sequence[Problem], question: Problem, shots: int, draw: random.Random) -> Episode:
    """An episode: `shots` examples of the pool in random order, the question not among them."""
    others = [each for each in pool if each.id != question.id]
    return Episode(tuple(draw.sample(others, min(shots, len(others)))), question)


# ---- the objectives


def restricted_divergence(student: Tensor, teacher: Tensor, allowed: Tensor) -> Tensor:
    """KL(teacher ‖ student) over the allowed tokens alone, both renormalised: logits [..., V] -> [...], nats."""
    log_p, log_q = (logits.float().masked_fill(~allowed, -torch.inf).log_softmax(-1) for logits in (teacher, student))
    return torch.where(allowed, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def first_answer_positions(batch: Batch) -> Tensor:
    """Where each row's answer is first predicted, [B]."""
    return batch.response.long().argmax(1)


def objective(
    hard_losses: Tensor,
    soft_losses: Tensor | None,
    answer_losses: Tensor | None,
    batch: Batch,
    hard: float,
    language: float,
) -> Tensor:
    """h · hard + (1-h) · soft of the answers, plus `language` times the same of the whole text; a scalar.

    hard_losses: negative log-likelihoods [B, T-1]. soft_losses: divergences from the teacher [B, T-1]; None where h
    is 1. answer_losses: what stands for soft losses on answers, if it is something else. h: `hard`.
    """

    def mixed(soft: Tensor | None) -> Tensor:
        return hard_losses if soft is None else hard * hard_losses + (1 - hard) * soft

    loss = weighted_mean(mixed(soft_losses if answer_losses is None else answer_losses), batch)
    if not language:
        return loss
    whole = replace(batch, weights=batch.attention[:, 1:].to(batch.weights.dtype))
    return loss + language * weighted_mean(mixed(soft_losses), whole)


@dataclass(frozen=True)
class InContextDistillation:
    """Teaches a student on texts of labelled examples.

    scope: "meta" draws episodes from the taught tasks of `problems`, "multitask" from the examples of the asked ones.
    episodes: how many texts. shots: labelled examples in each, the most that fit.
    hard: share of the right answers in each objective, the rest is the teacher's distribution; 1 needs no teacher.
    language: weight of the language-modelling objective (at first, at last), linear over the steps.
    labels_only: at the first token of an answer compare the labels' tokens alone, as is done in classification.
    """

    problems: TaskPools
    teacher: Teacher
    student: Student
    training: TrainingSettings
    decoding: InContext
    scope: Literal["meta", "multitask"]
    episodes: int = 512
    shots: int = 4
    hard: float = 0.5
    language: tuple[float, float] = (1.0, 0.0)
    labels_only: bool = True

    def __post_init__(self) -> None:
        if self.scope not in ("meta", "multitask"):
            raise ConfigError(f"method.scope={self.scope}: choose meta or multitask")
        for name, least in (("episodes", 1), ("shots", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least {least}")
        if not 0 <= self.hard <= 1:
            raise ConfigError(f"method.hard={self.hard}: must lie between 0 and 1")
        if len(self.language) != 2 or min(self.language) < 0:
            raise ConfigError(f"method.language={list(self.language)}: two weights, at first and at last, not negative")
        if not hasattr(self.problems, "examples"):
            raise ConfigError(
                "these problems belong to no tasks; choose problems=label_tasks, or problems=template_tasks with a file"
            )
        if self.labels_only and self.hard < 1 and not isinstance(self.teacher, InMemory):
            raise ConfigError(
                "method.labels_only=true compares the teacher's logits, which are not kept on disk; set it to false, "
                "or teacher@method.teacher=in_memory"
            )
        self.teacher.check(FORWARD_KL)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Draw episodes, compare with the teacher, learn."""
        texts, labels = self.texts(base, bench)
        reference = self.teacher.opened(base, texts, bench) if self.hard < 1 else None
        student = self.student.make(base, bench)
        step = torch.zeros((), dtype=torch.long, device=next(student.module.parameters()).device)
        vocabulary = base.module.get_input_embeddings().num_embeddings

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            logits = logits_of(module, batch)
            soft = answers = None
            if reference is not None and self.labels_only:
                with torch.no_grad():
                    theirs = logits_of(base.module, batch)
                soft = FORWARD_KL(logits[:, :-1], theirs[:, :-1])
                allowed = label_mask([labels[row] for row in batch.rows.tolist()], vocabulary).to(logits.device)
                answers = with_labels(soft, logits, theirs, batch, allowed)
            elif reference is not None:
                soft = reference.divergence(logits, batch, FORWARD_KL)
            return objective(token_losses(logits, batch), soft, answers, batch, self.hard, self.language_weight(step))

        train(
            student.module,
            list(student.module.parameters()),
            texts,
            loss,
            self.training,
            bench,
            "Meta-ICT" if self.scope == "meta" else "Multitask-ICT",
            after_step=lambda: step.add_(1),
            state=(step,),
        )
        return settled(student)

    def language_weight(self, step: Tensor) -> float:
        """Of the language-modelling objective at a step."""
        first, last = self.language
        share = min(1.0, int(step) / max(1, self.training.steps - 1))
        return first + (last - first) * share

    def texts(self, lm: LanguageModel, bench: Bench) -> tuple[list[Example], list[list[int]]]:
        """Episodes as token ids, and of each the first tokens of its task's labels; as many examples as fit."""
        longest = getattr(lm.engine, "context_tokens", None) or float("inf")
        found, labels = [], []
        for episode in self.drawn_episodes(bench.generator.initial_seed()):
            while True:
                answer = self.decoding.space + episode.question.gold
                example = tokenized(lm.tokenizer, self.decoding.prompt(episode), answer)
                if len(example) <= longest or not episode.examples:
                    break
                episode = replace(episode, examples=episode.examples[1:])
                bench.log.counts["examples that did not fit"] += 1
            if len(example) > longest:
                bench.log.counts["episodes too long"] += 1
                continue
            found.append(example)
            labels.append(first_tokens(lm, [self.decoding.space + label for label in episode.question.choices]))
        bench.log.counts["episodes"] += len(found)
        if not found:
            raise RunError(f"no episode fits into the {longest} positions of this model; choose shorter problems")
        return found, labels

    def drawn_episodes(self, seed: int) -> list[Episode]:
        """Episodes, each of a task that is drawn first: every task counts alike."""
        split = "train" if self.scope == "meta" else "test"
        pools = self.problems.examples(split)
        questions: dict[str, list[Problem]] = {task: list(pool) for task, pool in pools.items()}
        if self.scope == "meta":
            for problem in self.problems.read("train"):
                questions[self.problems.task_of(problem)].append(problem)
        draw = random.Random(seed)
        tasks = sorted(questions)
        episodes = []
        for _ in range(self.episodes):
            task = draw.choice(tasks)
            episodes.append(drawn(pools[task], draw.choice(questions[task]), self.shots, draw))
        return episodes


def with_labels(soft: Tensor, student: Tensor, teacher: Tensor, batch: Batch, allowed: Tensor) -> Tensor:
    """Soft losses [B, T-1] where the first token of an answer is compared over the tokens `allowed` [B, V] alone.

    Rows without an allowed token stay as they are. student, teacher: logits [B, T, V].
    """
    rows, places = torch.arange(len(soft), device=soft.device), first_answer_positions(batch)
    known = allowed.any(-1)
    open_to_all = allowed | ~known[:, None]
    own = restricted_divergence(student[rows, places], teacher[rows, places].detach(), open_to_all)
    found = soft.clone()
    found[rows, places] = torch.where(known, own, soft[rows, places])
    return found


def first_tokens(lm: LanguageModel, labels: Sequence[str]) -> list[int]:
    """The tokens that answers begin with; none where labels cannot be told apart by them."""
    ids = [lm.tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in labels]
    return sorted(set(ids)) if len(set(ids)) == len(labels) else []


def label_mask(labels: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Which tokens an answer may begin with, bool [B, V]."""
    mask = torch.zeros(len(labels), vocabulary, dtype=torch.bool)
    for row, own in enumerate(labels):
        mask[row, list(own)] = True
    return mask
