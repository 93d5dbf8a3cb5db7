"""The training loop: it learns, it goes on after a kill to the bit, and it changes what it was given only."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from torch import nn
from transformers import TrainingArguments

from harness import stages
from harness.errors import ConfigError, RunError
from harness.method import Bench, TrainingLog
from harness.progress import NoProgress
from methods.examples import Batch, Example
from methods.sharding import sharded_copy
from methods.training import (
    TrainingSettings,
    compiled_blocks,
    held_out_loss,
    language_modeling_loss,
    logits_of,
    token_losses,
    train,
    weighted_mean,
)

WINDOWS = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(0))


def bench(scratch: Path) -> Bench:
    return Bench(None, torch.Generator().manual_seed(0), scratch, NoProgress(), TrainingLog())


def trained(scratch: Path, settings: TrainingSettings, module=None, after_step=None, windows=WINDOWS):
    module = module or tiny_model("llama")
    parameters = [p for name, p in module.named_parameters() if "down_proj" in name]
    run = bench(scratch)
    train(module, parameters, windows, language_modeling_loss, settings, run, "test", after_step)
    return module, run.log


def test_the_loss_falls_and_only_what_was_given_changes(tmp_path):
    module, log = trained(tmp_path, TrainingSettings(steps=30, learning_rate=1e-2))
    curve = log.curves["training loss"]
    assert list(curve) == list(range(1, 31))
    assert curve[30] < curve[1]
    assert log.tokens == 30 * 24
    for name, parameter in tiny_model("llama").named_parameters():
        assert torch.equal(module.get_parameter(name), parameter) == ("down_proj" not in name), name
        assert not module.get_parameter(name).requires_grad


def test_one_step_without_momentum_is_adam_by_hand(tmp_path):
    """The first AdamW step moves every weight by the learning rate against the sign of its clipped gradient."""
    settings = TrainingSettings(steps=1, learning_rate=1e-3, schedule="constant", warmup_share=0.0)
    module, _ = trained(tmp_path, settings, windows=WINDOWS[:1])
    before = tiny_model("llama")
    weight = before.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    language_modeling_loss(before, WINDOWS[:1]).backward()
    clear = weight.grad.abs() > 1e-5  # Adam's epsilon does not count
    moved = module.model.layers[0].mlp.down_proj.weight - weight
    torch.testing.assert_close(moved[clear], -1e-3 * weight.grad[clear].sign(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_come_in_16_bits_take_every_small_step(dtype, tmp_path):
    """Steps below the last digit of bfloat16 would be lost: such a model is trained in float32 from where it is."""
    settings = TrainingSettings(steps=4, learning_rate=1e-5, schedule="constant", warmup_share=0)
    narrow, _ = trained(tmp_path / "a", settings, tiny_model("llama").to(dtype))
    wide, _ = trained(tmp_path / "b", settings, tiny_model("llama").to(dtype).float())
    for name, parameter in wide.named_parameters():
        assert torch.equal(narrow.get_parameter(name), parameter), name


def test_accumulated_windows_are_a_batch(tmp_path):
    one, _ = trained(tmp_path / "1", TrainingSettings(steps=3, learning_rate=1e-3, batch_size=2))
    two, _ = trained(tmp_path / "2", TrainingSettings(steps=3, learning_rate=1e-3, gradient_accumulation=2))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=name)


def test_one_process_trains_on_the_device_of_the_student_alone(monkeypatch, tmp_path):
    """Where the Trainer sees two devices, the first of them not the student's: the same texts, losses and weights."""
    settings, made = TrainingSettings(steps=4, learning_rate=1e-3, batch_size=2), TrainingArguments.__post_init__
    alone, log = trained(tmp_path / "alone", settings)

    def seeing_two(arguments: TrainingArguments) -> None:
        made(arguments)
        arguments._n_gpu, arguments._setup_devices = 2, torch.device("meta")

    monkeypatch.setattr(TrainingArguments, "__post_init__", seeing_two)
    among, other = trained(tmp_path / "among", settings)
    assert (other.tokens, other.curves) == (log.tokens, log.curves)
    assert all(map(torch.equal, among.parameters(), alone.parameters()))


def test_something_can_happen_after_every_step(tmp_path):
    module = tiny_model("llama")
    weight = module.model.layers[0].mlp.down_proj.weight
    mask = torch.rand(weight.shape) < 0.5
    weight.data[mask] = 0
    trained(tmp_path, TrainingSettings(steps=4, learning_rate=1e-2), module, lambda: weight.masked_fill_(mask, 0))
    assert not weight[mask].any()
    assert weight[~mask].all()


def test_no_steps_change_nothing(tmp_path):
    module, log = trained(tmp_path, TrainingSettings(steps=0, learning_rate=1.0))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), tiny_model("llama").parameters(), strict=True))
    assert log.tokens == 0


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    module = tiny_model("llama")
    with pytest.raises(
        RunError,
        match=r"test: the loss is nan at step 1 \(texts \d\); lower training.learning_rate; the last good .* the start",
    ):
        train(
            module,
            [module.model.layers[0].mlp.down_proj.weight],
            WINDOWS,
            lambda m, tokens: language_modeling_loss(m, tokens) * torch.nan,
            TrainingSettings(steps=2, learning_rate=1e-3),
            bench(tmp_path),
            "test",
        )


def test_compiled_blocks_learn_the_same_and_are_plain_again_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("methods.training.COMPILER", "aot_eager")  # inductor would take a minute
    plain, compiled = (tiny_model("llama") for _ in range(2))
    settings = TrainingSettings(steps=3, learning_rate=1e-3, batch_size=2)
    _, log = trained(tmp_path / "plain", settings, plain)
    counted = torch._dynamo.utils.counters
    counted.clear()
    with compiled_blocks(compiled):
        _, again = trained(tmp_path / "compiled", settings, compiled)
    assert counted["stats"]["unique_graphs"] == 2  # its first block reads what needs no gradient
    assert log.curves["training loss"] == pytest.approx(again.curves["training loss"], rel=1e-5)
    assert all(block._compiled_call_impl is None for block in compiled.model.layers)


def test_losses_through_the_kernel_are_the_plain_ones(monkeypatch):
    pytest.importorskip("triton", reason="the kernel is written in Triton")
    batch = Batch.of_examples([Example([5, 6], [7, 8, 9]), Example([3], [4])])
    plain = [tiny_model("llama") for _ in range(2)]
    for module, kernel in zip(plain, (False, True), strict=True):
        monkeypatch.setattr("methods.training.has_kernel", lambda logits, kernel=kernel: kernel)
        module.requires_grad_(True)
        language_modeling_loss(module, batch).backward()
    for (name, one), other in zip(plain[0].named_parameters(), plain[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4, msg=name)


SCRIPT = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
from architectures import tiny_model
from test_training import WINDOWS, TrainingSettings, trained
torch.set_num_threads(1)
count = 0
def after():
    global count
    count += 1
    if count == 7:
        os.kill(os.getpid(), signal.SIGKILL)
trained(Path({scratch!r}), TrainingSettings(steps=10, learning_rate=1e-2, checkpoint_steps=3), after_step=after)
"""


def test_the_time_of_a_try_that_was_killed_counts_up_to_where_the_next_goes_on(tmp_path):
    settings = TrainingSettings(steps=5, learning_rate=1e-3, checkpoint_steps=2)
    taken = []

    def killed_in_the_fourth_step():
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt

    def tried(after_step=None):
        module, log = tiny_model("llama"), TrainingLog(tmp_path / "curves.jsonl")
        run = replace(bench(tmp_path), log=log)
        weights = [module.model.layers[0].mlp.down_proj.weight]
        train(module, weights, WINDOWS, language_modeling_loss, settings, run, "test", after_step)
        return log

    with pytest.raises(KeyboardInterrupt):
        tried(killed_in_the_fourth_step)
    noted = TrainingLog(tmp_path / "curves.jsonl").seconds["training loss"]
    again = tried()
    assert again.earlier_seconds == noted[2] > 0
    assert again.seconds["training loss"][3] > noted[2]


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    """Killed after step 7, resumed from step 6 in another process: bit for bit what an undisturbed run gives."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1])]
    script = textwrap.dedent(SCRIPT.format(paths=paths, scratch=str(tmp_path / "killed")))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    settings = TrainingSettings(steps=10, learning_rate=1e-2, checkpoint_steps=3)
    steps = []
    resumed, _ = trained(tmp_path / "killed", settings, after_step=lambda: steps.append(1))
    whole, _ = trained(tmp_path / "whole", settings)
    assert len(steps) == 4
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    settings = TrainingSettings(steps=6, learning_rate=1e-2, checkpoint_steps=2)
    whole, _ = trained(tmp_path / "whole", settings)
    trained(tmp_path / "torn", settings)
    (tmp_path / "torn" / "training" / "checkpoint-6" / "trainer_state.json").write_text("{")
    steps = []
    again, _ = trained(tmp_path / "torn", settings, after_step=lambda: steps.append(1))
    assert len(steps) == 2
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_checkpoints_hold_what_is_trained_and_nothing_else(tmp_path):
    from safetensors import safe_open

    trained(tmp_path, TrainingSettings(steps=2, learning_rate=1e-2, checkpoint_steps=1))
    with safe_open(tmp_path / "training" / "checkpoint-2" / "model.safetensors", framework="pt") as file:
        weights = {key for key in file.keys() if key != "tokens_seen"}  # noqa: SIM118 not a dict
    assert len(weights) == len([n for n, _ in tiny_model("llama").named_parameters() if "down_proj" in n])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1"),
        ({"schedule": "sine"}, "schedule=sine"),
        ({"warmup_share": 1.0}, "warmup_share=1"),
        ({"final_share": 0.1}, "only schedule=cosine"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"validation_steps": -1}, "validation_steps=-1"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainingSettings(**{"steps": 1, "learning_rate": 1e-3, **values})


def test_a_module_without_its_own_parameters_can_be_trained_too(tmp_path):
    """What is trained need not belong to the model: scales of a closure, for instance."""
    scale = nn.Parameter(torch.tensor(3.0))
    train(
        tiny_model("llama"),
        [scale],
        WINDOWS,
        lambda module, tokens: (scale - 1).square(),
        TrainingSettings(steps=60, learning_rate=0.1, schedule="constant"),
        bench(tmp_path),
        "test",
    )
    assert float(scale.detach()) == pytest.approx(1.0, abs=0.2)


# ------------------------------------------------------------------------------------------------- batches and weights


def some_examples() -> list[Example]:
    draw = torch.Generator().manual_seed(3)
    sizes = [(3, 5, 1.0), (7, 2, 0.5), (1, 9, 2.0), (4, 4, 1.0)]
    ids = torch.randint(3, 97, (4, 20), generator=draw).tolist()
    return [Example(row[:p], row[p : p + r], w) for row, (p, r, w) in zip(ids, sizes, strict=True)]


def by_hand(module: nn.Module, examples: list[Example]) -> tuple[float, float]:
    """Sum of weighted token losses, and of weights, one example at a time, from log-softmax."""
    total = weights = 0.0
    for example in examples:
        ids = torch.tensor([[*example.prompt, *example.response]])
        scores = module(ids).logits.log_softmax(-1)
        for position in range(len(example.prompt), len(example)):
            total -= example.weight * float(scores[0, position - 1, ids[0, position]])
            weights += example.weight
    return total, weights


def test_only_responses_count_and_by_their_weights():
    module = tiny_model("llama")
    total, weights = by_hand(module, some_examples())
    assert float(language_modeling_loss(module, Batch.of_examples(some_examples()))) == pytest.approx(total / weights)
    assert held_out_loss(module, some_examples(), batch_size=3) == pytest.approx(total / weights)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt", "bloom"])
def test_padding_changes_nothing(kind):
    """Losses of a row are the same alone and beside a longer one, whatever the padding id is."""
    module = tiny_model(kind)
    examples = some_examples()
    for pad in (0, 5):
        batch = Batch.of_examples(examples, pad=pad)
        losses = token_losses(logits_of(module, batch), batch)
        for row, example in enumerate(examples):
            alone = Batch.of_examples([example])
            expected = token_losses(logits_of(module, alone), alone)[0]
            torch.testing.assert_close(losses[row, : len(example) - 1], expected, atol=2e-5, rtol=1e-4)


def test_a_window_is_a_response_without_a_prompt():
    module = tiny_model("llama")
    plain = module(input_ids=WINDOWS, labels=WINDOWS).loss
    torch.testing.assert_close(language_modeling_loss(module, Batch.of_windows(WINDOWS)), plain)
    as_examples = [Example(row[:1], row[1:]) for row in WINDOWS.tolist()]
    torch.testing.assert_close(language_modeling_loss(module, Batch.of_examples(as_examples)), plain)


def test_sequence_means_count_every_response_once():
    module = tiny_model("llama")
    examples = [Example(e.prompt, e.response) for e in some_examples()]
    expected = sum(by_hand(module, [e])[0] / by_hand(module, [e])[1] for e in examples) / len(examples)
    batch = Batch.of_examples(examples).with_sequence_means()
    assert float(weighted_mean(token_losses(logits_of(module, batch), batch), batch)) == pytest.approx(expected)


def test_passes_of_a_step_count_by_their_weights(tmp_path):
    """One step over four examples of unequal length: the gradient of the mean over all their tokens, not of means."""
    module = tiny_model("llama")
    weight = module.model.layers[0].mlp.down_proj.weight
    settings = TrainingSettings(
        steps=1, learning_rate=1e-3, gradient_accumulation=4, schedule="constant", warmup_share=0.0
    )
    seen = []
    run = bench(tmp_path)
    train(
        module,
        [weight],
        some_examples(),
        language_modeling_loss,
        settings,
        run,
        "test",
        before_step=lambda: seen.append(weight.grad.clone()),
    )
    whole = tiny_model("llama")
    parameter = whole.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    language_modeling_loss(whole, Batch.of_examples(some_examples())).backward()
    norm = parameter.grad.norm()
    torch.testing.assert_close(seen[0], parameter.grad / max(float(norm), 1.0), atol=1e-6, rtol=1e-4)
    assert run.log.curves["training loss"][1] == pytest.approx(
        float(language_modeling_loss(tiny_model("llama"), Batch.of_examples(some_examples()))), rel=1e-5
    )
    assert run.log.tokens == sum(len(example) for example in some_examples())


def test_a_batch_can_be_rewritten_before_its_loss_and_the_same_after_a_resume(tmp_path):
    """What `prepare` draws depends on the step alone: a run of six steps equals three and three."""

    def prepare(module, batch, generator):
        assert not torch.is_grad_enabled()
        drawn = torch.randint(3, 97, batch.tokens.shape, generator=generator)
        return Batch.of_windows(drawn, batch.rows)

    def run(folder, steps):
        module = tiny_model("llama")
        weight = module.model.layers[0].mlp.down_proj.weight
        settings = TrainingSettings(
            steps=steps,
            learning_rate=1e-3,
            checkpoint_steps=3,
            gradient_accumulation=2,
            schedule="constant",
            warmup_share=0.0,
        )
        train(module, [weight], WINDOWS, language_modeling_loss, settings, bench(folder), "test", prepare=prepare)
        return weight

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    assert torch.equal(run(tmp_path / "parts", 6), whole)
    assert not torch.equal(
        trained(tmp_path / "plain", TrainingSettings(steps=6, learning_rate=1e-3))[0]
        .model.layers[0]
        .mlp.down_proj.weight,
        whole,
    )


def test_held_out_text_is_looked_at_before_between_and_after(tmp_path):
    module = tiny_model("llama")
    weight = module.model.layers[0].mlp.down_proj.weight
    settings = TrainingSettings(steps=6, learning_rate=1e-2, validation_steps=2)
    run = bench(tmp_path)
    before = held_out_loss(module, WINDOWS)
    train(
        module,
        [weight],
        WINDOWS,
        language_modeling_loss,
        settings,
        run,
        "test",
        validate=lambda trained: held_out_loss(trained, WINDOWS),
    )
    curve = run.log.curves["validation loss"]
    assert list(curve) == [0, 2, 4, 6]
    assert curve[0] == pytest.approx(before)
    assert curve[6] == pytest.approx(held_out_loss(module, WINDOWS))
    assert curve[6] < before


def test_a_loss_that_stops_being_a_number_leaves_the_last_good_checkpoint(tmp_path):
    module = tiny_model("llama")
    weight = module.model.layers[0].mlp.down_proj.weight
    steps = []

    def loss(module, batch):
        return language_modeling_loss(module, batch) * (torch.nan if len(steps) == 5 else 1)

    settings = TrainingSettings(steps=8, learning_rate=1e-3, checkpoint_steps=2)
    with pytest.raises(RunError, match=r"nan at step 6 .*checkpoint-4"):
        train(module, [weight], WINDOWS, loss, settings, bench(tmp_path), "test", lambda: steps.append(1))
    assert weight.isfinite().all()


def test_no_text_is_refused(tmp_path):
    with pytest.raises(RunError, match="no text to train on"):
        trained(tmp_path, TrainingSettings(steps=1, learning_rate=1e-3), windows=WINDOWS[:0])


def test_an_example_without_a_response_is_named():
    with pytest.raises(RunError, match="example 7 has no response"):
        Batch.of_examples([Example([1, 2], [])], rows=[7])


def some_weights(module: nn.Module) -> list[nn.Parameter]:
    return [layer.mlp.down_proj.weight for layer in module.model.layers]


def most_weights(module: nn.Module) -> list[nn.Parameter]:
    return [weight for name, weight in module.named_parameters() if "input_layernorm" not in name]


def train_together(
    folder: Path, batch_size: int, weights, tied: bool, sharded: bool, killed_in: int, environment: dict
) -> None:
    """One of the processes that train a tiny model; it leaves weights and losses in a file named by its rank."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    module = tiny_model("llama")
    if tied:
        module.lm_head.weight = module.model.embed_tokens.weight
    parameters, run, calls = weights(module), replace(bench(folder), sharded=sharded), []
    settings = TrainingSettings(
        steps=4, learning_rate=1e-3, batch_size=batch_size, schedule="constant", checkpoint_steps=2, validation_steps=2
    )

    def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
        calls.append(1)
        if len(calls) == killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return language_modeling_loss(module, batch)

    def validate(module: nn.Module) -> float:
        return held_out_loss(module, some_examples())

    train(module, parameters, some_examples(), loss, settings, run, "test", validate=validate)
    curves = run.log.curves
    losses = [curves["training loss"][3], curves["training loss"][4], curves["validation loss"][4]]
    left = [*(p.detach() for p in parameters), torch.tensor(losses)]
    torch.save(left, folder / environment.get("RANK", "0"))


def started(folder: Path, count: int, weights, tied: bool, sharded: bool = False, killed_in: int = 0) -> list:
    """Processes over gloo that train together, two texts a step however many they are."""
    folder.mkdir(exist_ok=True)
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [together | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)] if count > 1 else [{}]
    stages.warm_up()  # its processes begin with torch and transformers loaded
    make = multiprocessing.get_context("forkserver").Process
    made = [
        make(target=train_together, args=(folder, 2 // count, weights, tied, sharded, killed_in, rank))
        for rank in ranks
    ]
    for process in made:
        process.start()
    return made


def finish(running: list) -> None:
    for process in running:
        process.join(timeout=240)
        assert process.exitcode == 0


def left_by(folder: Path, rank: int = 0) -> list[torch.Tensor]:
    return torch.load(folder / str(rank), weights_only=True)


@pytest.mark.parametrize(
    ("sharded", "weights", "tied"),
    [(False, some_weights, False), (True, most_weights, True)],
    ids=["data-parallel", "sharded"],
)
def test_two_processes_train_like_one(sharded, weights, tied, tmp_path):
    """Two processes over gloo with a text each learn what one learns from two: the same losses, the same weights.

    Whether each holds the whole model or half of it.
    """
    two, one = tmp_path / "two", tmp_path / "one"
    finish([*started(two, 2, weights, tied, sharded), *started(one, 1, weights, tied)])
    for rank in range(2):
        for a, b in zip(left_by(two, rank), left_by(one), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    parts = list((two / "training" / "checkpoint-4").glob("parts/__?_0.distcp"))
    assert len(parts) == (2 if sharded else 0)


def test_a_killed_sharded_run_goes_on_to_the_same_weights(tmp_path):
    """Killed in step 4, resumed from the parts of step 2: bit for bit what an undisturbed run gives."""
    whole = started(tmp_path / "whole", 2, most_weights, False, True)
    for process in (killed := started(tmp_path / "killed", 2, most_weights, False, True, killed_in=4)):
        process.join(timeout=240)
        assert process.exitcode
    assert killed[0].exitcode == -signal.SIGKILL
    finish(whole)
    finish(started(tmp_path / "killed", 2, most_weights, False, True))
    for rank in range(2):
        assert all(map(torch.equal, left_by(tmp_path / "killed", rank), left_by(tmp_path / "whole", rank)))


@pytest.mark.parametrize(
    ("count", "more", "message"),
    [
        (1, {}, "--num_processes 2"),
        (2, {"after_step": int}, r"\(after_step\).*data parallel"),
    ],
)
def test_what_cannot_be_sharded_is_refused(count, more, message, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    module, run = tiny_model("llama"), replace(bench(tmp_path), sharded=True)
    settings = TrainingSettings(steps=1, learning_rate=1e-3)
    with pytest.raises(ConfigError, match=message):
        train(module, some_weights(module), WINDOWS, language_modeling_loss, settings, run, "test", **more)
    with pytest.raises(ConfigError, match="beside the student's"):
        sharded_copy(module, [nn.Parameter(torch.ones(2))], torch.device("cpu"))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
