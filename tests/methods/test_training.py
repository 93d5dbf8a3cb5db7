"""The training loop: it learns, it goes on after a kill to the bit, and it changes what it was given only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from torch import nn

from harness.errors import ConfigError, RunError
from harness.method import Bench, TrainingLog
from harness.progress import NoProgress
from methods.training import TrainingSettings, language_modeling_loss, train

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


def test_accumulated_windows_are_a_batch(tmp_path):
    one, _ = trained(tmp_path / "1", TrainingSettings(steps=3, learning_rate=1e-3, batch_size=2))
    two, _ = trained(tmp_path / "2", TrainingSettings(steps=3, learning_rate=1e-3, gradient_accumulation=2))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=name)


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
    with pytest.raises(RunError, match=r"test: the loss is no number at step 1; lower training.learning_rate"):
        train(
            module,
            [module.model.layers[0].mlp.down_proj.weight],
            WINDOWS,
            lambda m, tokens: language_modeling_loss(m, tokens) * torch.nan,
            TrainingSettings(steps=2, learning_rate=1e-3),
            bench(tmp_path),
            "test",
        )


SCRIPT = """
import os, signal, sys
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
        assert len(file.keys()) == len([n for n, _ in tiny_model("llama").named_parameters() if "down_proj" in n])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1"),
        ({"schedule": "sine"}, "schedule=sine"),
        ({"warmup_share": 1.0}, "warmup_share=1"),
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
