"""The training loop of everything that trains a whole model: transformers' Trainer, with the loss as an argument.

Quantization-aware training, scale and adapter tuning, recovery after pruning and distillation bring their losses.
What is trained is a list of parameters, the rest of the model is left alone and is in no checkpoint. A run that was
killed goes on from its last checkpoint to exactly the result it would have had. Several processes share the work when
`accelerate launch` starts them, data parallel or sharded (methods/sharding.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.environment import process_rank, training_processes
from harness.errors import ConfigError, RunError
from methods import sharding
from methods.blocks import decoder_blocks
from methods.examples import Batch, Data, collated

if TYPE_CHECKING:
    from harness.method import Bench

Loss = Callable[[nn.Module, Batch], Tensor]
Prepare = Callable[[nn.Module, Batch, torch.Generator], Batch]
SCHEDULES = ("constant", "linear", "cosine")
COMPILER = "inductor"  # backend of torch.compile
TINY = torch.finfo(torch.float32).tiny
ROWS_SHOWN = 8  # texts of a failing batch that a message names


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast.

    steps: optimizer steps. batch_size: texts in a forward pass. gradient_accumulation: passes in a step.
    schedule: of the learning rate after the warm-up, which takes `warmup_share` of the steps.
    final_share: of the learning rate, what is left of it at the end of a cosine.
    weight_decay: of matrices; vectors and scales are left out. betas: of AdamW.
    maximum_gradient_norm: gradients are clipped to it. checkpoint_steps: steps between checkpoints.
    validation_steps: steps between looks at held-out text, where a method looks at some; 0: at the start and the end.
    mixed_precision: bfloat16 products on GPUs; parameters are float32 in any case.
    compile_blocks: compile decoder blocks, which takes a minute or so and pays from some thousand steps on.
    """

    steps: int
    learning_rate: float
    batch_size: int = 1
    gradient_accumulation: int = 1
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_share: float = 0.1
    final_share: float = 0.0
    weight_decay: float = 0.0
    betas: Sequence[float] = (0.9, 0.999)
    maximum_gradient_norm: float = 1.0
    checkpoint_steps: int = 20
    validation_steps: int = 0
    mixed_precision: bool = False
    compile_blocks: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"training.steps={self.steps}: must be 0 (no training) or greater")
        for name in ("batch_size", "gradient_accumulation", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name}={getattr(self, name)}: must be at least 1")
        if self.validation_steps < 0:
            raise ConfigError(f"training.validation_steps={self.validation_steps}: must not be negative")
        if not self.learning_rate >= 0:
            raise ConfigError(f"training.learning_rate={self.learning_rate}: must not be negative")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"training.schedule={self.schedule}: choose one of {', '.join(SCHEDULES)}")
        if not 0 <= self.warmup_share < 1:
            raise ConfigError(f"training.warmup_share={self.warmup_share}: must lie between 0 and 1")
        if not 0 <= self.final_share <= 1 or (self.final_share and self.schedule != "cosine"):
            raise ConfigError(
                f"training.final_share={self.final_share}: must lie between 0 and 1, and only schedule=cosine has one"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"training.betas={list(self.betas)}: must be two numbers from 0 to below 1")

    @property
    def texts(self) -> int:
        """How many texts one process reads, repeats included."""
        return self.steps * self.batch_size * self.gradient_accumulation


# -------------------------------------------------------------------------------------------------------------- losses


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Negative log-likelihood of each next token: logits [B, T, V] of the batch -> nats [B, T-1], float32."""
    if has_kernel(logits):
        return mixed_token_losses(logits, None, batch, 0.0)
    targets = batch.tokens.roll(-1, 1)  # the last column is left out below: cheaper than a copy of logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view_as(targets)[:, :-1]


def has_kernel(logits: Tensor) -> bool:
    """Whether losses of these logits are computed by `methods.mixed_loss`, which is for GPUs."""
    return logits.device.type == "cuda" and find_spec("triton") is not None


def mixed_token_losses(logits: Tensor, teacher: Tensor | None, batch: Batch, share: float) -> Tensor:
    """(1 - share) · loss of the next token + share · KL from the teacher: logits [B, T, V] -> nats [B, T-1]."""
    from methods.mixed_loss import mixed_losses

    targets = batch.tokens.roll(-1, 1)
    other = None if teacher is None else teacher.flatten(0, 1)
    return mixed_losses(logits.flatten(0, 1), other, targets.flatten(), share).view_as(targets)[:, :-1]


def weighted_mean(values: Tensor, batch: Batch) -> Tensor:
    """Mean of [B, T-1] over the predictions that count, by their weights; a scalar."""
    return (values * batch.weights).sum() / batch.weights.sum().clamp(min=TINY)


def logits_of(module: nn.Module, batch: Batch) -> Tensor:
    """Logits [B, T, V] of a batch, past no cache."""
    mask = batch.attention if batch.padded else None
    return module(input_ids=batch.tokens, attention_mask=mask, use_cache=False).logits


def language_modeling_loss(module: nn.Module, batch: Batch | Tensor) -> Tensor:
    """Mean negative log-likelihood of the tokens that are learned, in nats; windows of ids [B, T] learn all."""
    batch = Batch.of_windows(batch) if isinstance(batch, Tensor) else batch
    return weighted_mean(token_losses(logits_of(module, batch), batch), batch)


@torch.no_grad()
def held_out_loss(module: nn.Module, data: Data, loss: Loss = language_modeling_loss, batch_size: int = 4) -> float:
    """`loss` of a model over a whole data set, nothing trained: every prediction counts by its weight."""
    total = weights = 0.0
    device = next(module.parameters()).device
    for start in range(0, len(data), batch_size):
        batch = collated(data, range(start, min(start + batch_size, len(data))), 0).to(device)
        weight = float(batch.weights.sum())
        total += float(loss(module, batch)) * weight
        weights += weight
    return total / weights


# ------------------------------------------------------------------------------------------------------------ the loop


def train(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    data: Data,
    loss: Loss,
    settings: TrainingSettings,
    bench: Bench,
    what: str,
    after_step: Callable[[], None] | None = None,
    state: Sequence[Tensor] = (),
    before_step: Callable[[], None] | None = None,
    first_step: int = 0,
    prepare: Prepare | None = None,
    validate: Callable[[nn.Module], float] | None = None,
) -> None:
    """Train `parameters` of `module` on windows of ids [S, T] or on examples, in place.

    loss: (module, batch) -> scalar, the mean over the batch by its weights; passes of one step, and processes, count by
        the weights of their batches, so that a step minimises the mean over all that it reads.
    after_step: called after every optimizer step (masks, bounds).
    before_step: called when the gradients of a step are whole and clipped, before they are used.
    state: tensors that change in place while training and are no parameters (moving averages): kept in checkpoints.
    A model of which 16-bit parameters are trained is float32 from here on.
    first_step: where this training begins on the curve of a method that trains several times.
    prepare: (module, batch, generator) -> batch, rewrites every batch of a step before its losses, without gradients:
        to sample from the model that is trained. The generator depends on seed, step, pass and process alone.
    validate: held-out loss of the model that is given to it, in nats; goes into the log beside the training loss.
    Texts are read in shuffled passes, in an order that depends on the seed alone.
    Raises RunError when the loss stops being a number, before the step is taken; the last checkpoint stays.
    """
    if len(data) == 0:
        raise RunError(f"{what}: there is no text to train on; check the corpus, or method.examples")
    if settings.steps == 0:
        return
    parameters = list(parameters)
    _widen(module, parameters)
    if bench.sharded:
        if settings.compile_blocks:
            raise ConfigError("training.compile_blocks=true with hardware.sharded=true: set one of them to false")
        sharding.check(what, after_step=after_step, before_step=before_step, state=state, prepare=prepare)
    order = _order(len(data), settings.texts * training_processes(), bench.generator.initial_seed())
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        trained = _Trained(module, parameters, state, loss)
        look = None if validate is None else lambda: validate(trained.module_of())
        callback = _callback(settings, bench, what, before_step, after_step, first_step, look)
        trainer = _trainer(trained, module, data, order, settings, bench, what, callback, prepare)
        trainer.train(resume_from_checkpoint=_last_checkpoint(bench.scratch / "training"))
    if bench.sharded:
        sharding.bring_home(trained.module, module, trained.device)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    module.eval()
    bench.log.tokens += int(trained.tokens_seen) * training_processes()


def _widen(module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Make a model float32 when 16-bit parameters are trained: most steps are less than the last digit of those."""
    if all(parameter.dtype not in (torch.float16, torch.bfloat16) for parameter in parameters):
        return
    module.float()
    for parameter in parameters:  # those beside the module's
        parameter.data = parameter.data.float()


@contextmanager
def compiled_blocks(module: nn.Module, wanted: bool = True) -> Iterator[None]:
    """The decoder blocks of a model compiled as long as this is open. They are alike, so that one is compiled."""
    blocks = list(decoder_blocks(module)[1]) if wanted else []
    for block in blocks:
        block.compile(backend=COMPILER, dynamic=False)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # what nn.Module.compile sets: a module with it cannot be copied


class _Trained(nn.Module):
    """What the Trainer sees: what training changes and nothing else, so that checkpoints hold nothing else.

    Only a model that is sharded over processes is seen whole, because each of them holds a part of it.
    """

    def __init__(
        self, module: nn.Module, parameters: Sequence[nn.Parameter], state: Sequence[Tensor], loss: Loss
    ) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        for index, tensor in enumerate(state):
            self.register_buffer(f"state_{index}", tensor)
        self.device = parameters[0].device
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.long, device=self.device))
        self.module_of = lambda: module  # a closure is no submodule
        self.loss = loss
        self.padded: bool | None = None  # of the batches of this step: asking a GPU would make it wait

    def forward(self, **tensors: Tensor) -> dict[str, Tensor]:
        """The loss of a batch."""
        batch = replace(Batch.from_dict(tensors), known_padded=self.padded)
        self.tokens_seen += batch.attention.sum()
        return {"loss": self.loss(self.module_of(), batch)}

    def shard(self) -> None:
        """Train a sharded copy of the module in its place."""
        self.module = sharding.sharded_copy(self.module_of(), list(self.trained), self.device)
        self.module_of = lambda: self.module
        del self.trained

    def train(self, mode: bool = True) -> _Trained:
        """The model stays as it was given: its dropout does not wake up."""
        self.training = mode
        return self


def _callback(
    settings: TrainingSettings,
    bench: Bench,
    what: str,
    before_step: Callable[[], None] | None,
    after_step: Callable[[], None] | None,
    first_step: int,
    validate: Callable[[], float] | None,
) -> Any:
    from transformers import TrainerCallback

    def look(step: int) -> None:
        if validate is not None:
            with torch.no_grad():
                bench.log.point("validation loss", first_step + step, validate())

    class Callback(TrainerCallback):
        """Progress, log and what else happens around a step."""

        def __init__(self) -> None:
            self.bar: Iterator[int] = iter(bench.progress.track(range(settings.steps), what, settings.steps))

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                look(0)
            else:
                bench.log.go_on("training loss", first_step + state.global_step)
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
            step = state.global_step
            if step == settings.steps or (settings.validation_steps and step % settings.validation_steps == 0):
                look(step)
            next(self.bar, None)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                bench.log.point("training loss", first_step + state.global_step, logs["loss"])

    return Callback()


def _trainer(
    trained: _Trained,
    module: nn.Module,
    data: Data,
    order: Tensor,
    settings: TrainingSettings,
    bench: Bench,
    what: str,
    callback: Any,
    prepare: Prepare | None,
) -> Any:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments, get_scheduler
    from transformers.trainer_callback import PrinterCallback

    seed, device = bench.generator.initial_seed(), trained.device

    class Loop(Trainer):
        """Reads the texts in the order that was drawn, and weighs them as `train` says.

        passes: losses and rows of this step's passes.
        """

        passes: list[tuple[Tensor, Tensor]]

        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
            learned = [parameter for parameter in trained.parameters() if parameter.requires_grad]
            groups = [
                {"params": [p for p in learned if p.ndim > 1], "weight_decay": settings.weight_decay},
                {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(
                groups, lr=settings.learning_rate, betas=tuple(settings.betas), fused=device.type == "cuda" or None
            )
            self.optimizer.register_step_pre_hook(lambda *_: self.check_losses())
            return self.optimizer

        def check_losses(self) -> None:
            """Raise RunError for a step whose losses are no numbers: once a step, because asking makes a GPU wait."""
            passes, self.passes = self.passes, []
            # none: reading a sharded checkpoint steps once, to give the optimizer a state to read into
            if not passes or bool(torch.stack([loss for loss, _ in passes]).isfinite().all()):
                return
            loss, texts = next((loss, texts) for loss, texts in passes if not bool(loss.isfinite()))
            rows = ", ".join(str(int(row)) for row in texts[:ROWS_SHOWN])
            kept = _last_checkpoint(bench.scratch / "training")
            raise RunError(
                f"{what}: the loss is {float(loss)} at step {self.state.global_step + 1} (texts {rows}); lower "
                f"training.learning_rate; the last good checkpoint is {Path(kept).name if kept else 'the start'}"
            )

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            name = {"constant": "constant_with_warmup", "cosine": "cosine_with_min_lr"}.get(
                settings.schedule, settings.schedule
            )
            extra = {"min_lr_rate": settings.final_share} if settings.schedule == "cosine" else {}
            warmup = round(settings.warmup_share * settings.steps)
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = get_scheduler(name, optimizer, warmup, settings.steps, scheduler_specific_kwargs=extra)
            return self.lr_scheduler

        def get_batch_samples(self, iterator: Iterator[Any], count: int, device: torch.device) -> tuple[list, Tensor]:
            """The passes of one step, and the sum of their weights over all processes."""
            batches = [dict(batch) for _, batch in zip(range(count), iterator, strict=False)]
            trained.padded = not all(bool(batch["attention"].all()) for batch in batches)  # still in host memory
            if prepare is not None:
                trained.padded = None
                for index, batch in enumerate(batches):
                    drawn = _generator(seed, self.state.global_step, index)
                    with torch.no_grad(), self.accelerator.autocast():  # as the losses are computed
                        batches[index] = prepare(module, Batch.from_dict(batch).to(device), drawn).as_dict()
            total = torch.stack([batch["weights"].sum() for batch in batches]).sum().to(device)
            if training_processes() > 1:
                total = self.accelerator.gather(total).sum()
            return batches, total

        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Tensor],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Tensor:
            """The share of this pass in the loss of the step."""
            loss = model(**inputs)["loss"]
            self.passes.append((loss.detach(), inputs["rows"]))
            share = inputs["weights"].sum() / num_items_in_batch.clamp(min=TINY)
            return loss * share * training_processes()  # gradients of several processes are averaged

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
        seed=seed % 2**32,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        log_level="error",
    )
    if training_processes() == 1:  # on the device of the student: the Trainer would take the first GPU, and all others
        arguments._n_gpu, arguments._setup_devices = 1, device
        if device.type == "cuda":
            torch.cuda.set_device(device)
    if bench.sharded:
        trained.shard()  # the arguments above have brought the processes together
    trainer = (_sharded(Loop) if bench.sharded else Loop)(
        model=trained,
        args=arguments,
        train_dataset=order.tolist(),
        data_collator=lambda rows: collated(data, rows, 0).as_dict(),
        callbacks=[callback],
    )
    trainer.passes = []
    trainer.model_accepts_loss_kwargs = True  # compute_loss above weighs every pass itself
    trainer.remove_callback(PrinterCallback)
    return trainer


def _sharded(loop: type) -> type:
    """The loop for a model that is sharded already: nothing wraps it again, each process keeps its part of it."""

    class Sharded(loop):
        """Checkpoints are `sharding.save_parts`; gradients are averaged by the sharded modules themselves."""

        def _wrap_model(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
            return _Wrapped(model)  # another object: accelerate would wrap the model itself

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            sharding.save_parts(Path(output_dir), self.model, self.optimizer, self.lr_scheduler)

        def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
            """With the optimizer, below."""

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                sharding.load_parts(Path(checkpoint), self.model, self.optimizer, self.lr_scheduler)

    return Sharded


class _Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **tensors: Tensor) -> dict[str, Tensor]:
        return self.inner(**tensors)


def _generator(seed: int, step: int, index: int) -> torch.Generator:
    """Randomness of one pass of one step on one process, the same after a resume."""
    parts = (seed, step, index, process_rank())
    mixed = 0
    for part in parts:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


def _order(available: int, wanted: int, seed: int) -> Tensor:
    """Numbers of `wanted` texts: whole shuffled passes over all, the last one cut short."""
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
