"""The training loop of everything that trains a whole model: transformers' Trainer, with the loss as an argument.

Quantization-aware training, scale and adapter tuning use it as they are; pruning recovery and distillation bring other
losses. What is trained is a list of parameters, the rest of the model is left alone and is in no checkpoint. A run
that was killed goes on from its last checkpoint to exactly the result it would have had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from harness.errors import ConfigError, RunError

if TYPE_CHECKING:
    from harness.method import Bench

Loss = Callable[[nn.Module, Tensor], Tensor]
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast.

    steps: optimizer steps. batch_size: windows in a forward pass. gradient_accumulation: passes in a step.
    schedule: of the learning rate after the warm-up, which takes `warmup_share` of the steps.
    weight_decay: of matrices; vectors and scales are left out. maximum_gradient_norm: gradients are clipped to it.
    checkpoint_steps: steps between checkpoints.
    mixed_precision: bfloat16 products on GPUs; parameters stay in float32.
    """

    steps: int
    learning_rate: float
    batch_size: int = 1
    gradient_accumulation: int = 1
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_share: float = 0.1
    weight_decay: float = 0.0
    maximum_gradient_norm: float = 1.0
    checkpoint_steps: int = 20
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"training.steps={self.steps}: must be 0 (no training) or greater")
        for name in ("batch_size", "gradient_accumulation", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name}={getattr(self, name)}: must be at least 1")
        if not self.learning_rate >= 0:
            raise ConfigError(f"training.learning_rate={self.learning_rate}: must not be negative")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"training.schedule={self.schedule}: choose one of {', '.join(SCHEDULES)}")
        if not 0 <= self.warmup_share < 1:
            raise ConfigError(f"training.warmup_share={self.warmup_share}: must lie between 0 and 1")

    @property
    def windows(self) -> int:
        """How many windows are read, repeats included."""
        return self.steps * self.batch_size * self.gradient_accumulation


def language_modeling_loss(module: nn.Module, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of each next token: ids [B, T] -> nats."""
    return module(input_ids=tokens, labels=tokens, use_cache=False).loss


def train(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    windows: Tensor,
    loss: Loss,
    settings: TrainingSettings,
    bench: Bench,
    what: str,
    after_step: Callable[[], None] | None = None,
    state: Sequence[Tensor] = (),
    before_step: Callable[[], None] | None = None,
    first_step: int = 0,
) -> None:
    """Train `parameters` of `module` on token windows [S, T], in place.

    loss: (module, ids [B, T]) -> scalar. after_step: called after every optimizer step (masks, bounds).
    before_step: called when the gradients of a step are whole and clipped, before they are used.
    state: tensors that change in place while training and are no parameters (moving averages): kept in checkpoints.
    first_step: where this training begins on the curve of a method that trains several times.
    Windows are read in shuffled passes, in an order that depends on the seed alone. The loss goes into the run's log.
    Raises RunError when the loss stops being a number.
    """
    if settings.steps == 0:
        return
    parameters = list(parameters)
    order = _order(len(windows), settings.windows, bench.generator.initial_seed())
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        trained = _Trained(module, parameters, state, loss)
        trainer = _trainer(trained, windows[order], settings, bench, what, before_step, after_step, first_step)
        trainer.train(resume_from_checkpoint=_last_checkpoint(bench.scratch / "training"))
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    module.eval()
    bench.log.tokens += settings.windows * windows.shape[1]


class _Trained(nn.Module):
    """What the Trainer sees: what training changes and nothing else, so that checkpoints hold nothing else."""

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter], state: Sequence[Tensor], loss: Loss) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        for index, tensor in enumerate(state):
            self.register_buffer(f"state_{index}", tensor)
        self._compute = lambda tokens: loss(module, tokens)  # a closure is no submodule

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """The loss of a batch of ids [B, T]."""
        return {"loss": self._compute(input_ids)}


def _trainer(
    trained: _Trained,
    windows: Tensor,
    settings: TrainingSettings,
    bench: Bench,
    what: str,
    before_step: Callable[[], None] | None,
    after_step: Callable[[], None] | None,
    first_step: int,
) -> Any:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

    class Callback(TrainerCallback):
        """Progress, log and what else happens after a step."""

        def __init__(self) -> None:
            self.bar: Iterator[int] = iter(bench.progress.track(range(settings.steps), what, settings.steps))

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for _done in range(state.global_step + 1):
                next(self.bar, None)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if before_step is not None:
                with torch.no_grad():
                    before_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if after_step is not None:
                with torch.no_grad():
                    after_step()
            next(self.bar, None)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                if logs["loss"] != logs["loss"]:
                    raise RunError(
                        f"{what}: the loss is no number at step {state.global_step}; lower training.learning_rate"
                    )
                bench.log.point("training loss", first_step + state.global_step, logs["loss"])

    class InOrder(Trainer):
        """Reads the windows as they come: they were shuffled before."""

        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    parameters = list(trained.parameters())
    device = parameters[0].device
    arguments = TrainingArguments(
        output_dir=str(bench.scratch / "training"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_grad_norm=settings.maximum_gradient_norm,
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        bf16=settings.mixed_precision and device.type == "cuda",
        seed=bench.generator.initial_seed() % 2**32,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        log_level="error",
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
    )
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    warmup = round(settings.warmup_share * settings.steps)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=settings.steps)
    trainer = InOrder(
        model=trained,
        args=arguments,
        train_dataset=[{"input_ids": window} for window in windows],
        optimizers=(optimizer, scheduler),
        callbacks=[Callback()],
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _order(available: int, wanted: int, seed: int) -> Tensor:
    """Numbers of `wanted` windows: whole shuffled passes over all, the last one cut short."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(available, generator=generator) for _ in range(-(-wanted // available))]
    return torch.cat(passes)[:wanted]


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written whole: its state file comes last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # torn by a kill: the one before it is whole
        return str(path)
    return None
