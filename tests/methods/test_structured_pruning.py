"""LLM-Pruner, LoRAPrune, GUM and what they share: identities, brute force, closed forms, artifacts."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model, tiny_tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from harness import artifact
from harness.engines.transformers import TransformersEngine
from harness.errors import ConfigError, RunError
from harness.method import Bench, LanguageModel, TrainingLog
from harness.probes.footprint import analytic_kv_bytes_per_token
from harness.progress import NoProgress
from methods.blocks import block_linears
from methods.low_rank import LowRankLinear, add_adapters, merge_adapters
from methods.pruning import gum
from methods.pruning.gum import GUM, GlobalPruning, multiplying, removed_neurons, similarity
from methods.pruning.llm_pruner import AGGREGATES, LLMPruner, element_importance, loss_gradients
from methods.pruning.loraprune import GradualPruning, LoRAPrune, cubic_progress, estimated_gradient
from methods.pruning.structured import (
    Extent,
    Layer,
    find_layers,
    masking,
    matrix_scores,
    removed_share,
)
from methods.pruning.uneven import MODEL_TYPE, UnevenConfig, rebuilt
from methods.training import TrainingSettings, language_modeling_loss

NO_HEADS = ("bloom", "falcon_alibi")  # a slope for each head comes from outside the block
TOKENS = tiny_tokens(2, 16)
NONE = TrainingSettings(steps=0, learning_rate=1e-3)


class Windows:
    def calibration_windows(self, tokenizer, generator):
        return torch.randint(3, 97, (8, 24), generator=generator)


def bench(folder=Path(".")):
    return Bench(Windows(), torch.Generator().manual_seed(0), folder, NoProgress(), TrainingLog())


def language_model(name="llama", dtype=torch.float32):
    module = tiny_model(name).to(dtype)
    return LanguageModel(module, None, TransformersEngine(module), torch.float16)


def layers_of(module, name="llama"):
    return find_layers(module, TOKENS[:1], heads=name not in NO_HEADS)


def some_kept(layers, even, seed=1):
    """(layer, kind, mask) with a head of every second block and channels gone; other channels in each block."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for index, layer in enumerate(layers):
        for kind, units in layer.units.items():
            fewest = 1 if kind == "heads" else 9 + (0 if even else index)
            if units.count > 1 and (even or kind == "channels" or index % 2 == 0):
                kept = torch.ones(units.count, dtype=torch.bool)
                kept[torch.randperm(units.count, generator=generator)[:fewest]] = False
                chosen.append((layer, kind, kept))
    return chosen


def logits(module, tokens=TOKENS):
    with torch.no_grad():
        return module(tokens).logits


# ------------------------------------------------------------------------------------------- finding and removing


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("even", [True, False])
def test_removing_is_masking(name, even):
    """Sliced, rebuilt and merely masked models give the same logits, in every architecture."""
    lm = language_model(name)
    layers = layers_of(lm.module, name)
    chosen = some_kept(layers, even)
    lm.module.double()
    with masking([(layer.module, layer.units[kind], kept) for layer, kind, kept in chosen]):
        expected = logits(lm.module)
    full = logits(lm.module)
    for layer, kind, kept in chosen:
        layer.remove(kind, kept)
    torch.testing.assert_close(logits(lm.module), expected, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(full, expected)
    after = rebuilt(lm, layers).module
    torch.testing.assert_close(logits(after), expected, rtol=1e-5, atol=1e-6)  # Gemma keeps a constant in float32


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_gone_is_the_closed_form(name):
    lm = language_model(name)
    before = sum(p.numel() for p in lm.module.parameters())
    config, layers = lm.module.config, layers_of(lm.module, name)
    width = config.hidden_size
    expected = biases = 0
    for layer, kind, kept in some_kept(layers, False):
        removed, units = int((~kept).sum()), layer.units[kind]
        if kind == "heads":
            size = len(units.columns) // (units.count * units.queries)
            expected += removed * (2 * units.queries + 2) * size * width
        else:
            matrices = 3 if "gate" in str([*units.rows]) else 2
            expected += removed * matrices * width
        biases += sum(
            int((~kept[unit]).sum())
            for linear, unit in units.rows.items()
            if layer.module.get_submodule(linear).bias is not None
        )
        layer.remove(kind, kept)
    assert before - sum(p.numel() for p in lm.module.parameters()) == expected + biases
    weights = sum(layer.weights for layer in layers)
    assert removed_share(layers) == pytest.approx(expected / weights)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3", "phi3"])
def test_a_key_value_head_goes_with_the_queries_that_read_it(name):
    """Euler's identity of degree one: the sum of w · ∂L/∂w over a group's values is that over its output columns."""
    module = tiny_model(name).double()
    for layer in find_layers(module, TOKENS[:1]):
        units = layer.units["heads"]
        assert (units.count, units.queries) == (2, 2)
        names = [*units.rows, units.reader]
        weights = {n: layer.module.get_submodule(n).weight for n in names}
        gradients, _ = loss_gradients(module, weights, TOKENS, squares=False)
        products = {n: weights[n].detach() * gradients[n] for n in names}
        sums = []  # of each matrix, a row for each group
        for n, unit in units.rows.items():
            table = torch.zeros(3, 2, dtype=torch.float64)
            table.index_put_((units.parts[n], unit), products[n].sum(1).double(), accumulate=True)
            sums.extend(row for row in table if row.any())
        reads = torch.zeros(2, dtype=torch.float64).index_add_(0, units.columns, products[units.reader].sum(0).double())
        query, key, value = sums
        torch.testing.assert_close(value, reads, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(query, key, rtol=1e-3, atol=1e-6)


def test_a_feed_forward_channel_weighs_the_same_on_both_sides():
    module = tiny_model("llama").double()
    layer = find_layers(module, TOKENS[:1])[1]
    weights = {n: layer.module.get_submodule(n).weight for n in ("mlp.up_proj", "mlp.down_proj")}
    gradients, _ = loss_gradients(module, weights, TOKENS, squares=False)
    up, down = ((weights[n].detach() * gradients[n]) for n in weights)
    torch.testing.assert_close(up.sum(1), down.sum(0), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", NO_HEADS)
def test_heads_that_cannot_go_are_refused_with_a_way_out(name):
    module = tiny_model(name)
    with pytest.raises(ConfigError, match=r"h\.0: heads cannot be removed one by one .* method.heads=false"):
        find_layers(module, TOKENS[:1])
    assert all(layer.units.keys() == {"channels"} for layer in find_layers(module, TOKENS[:1], heads=False))


def test_a_norm_over_all_heads_is_seen_and_refused():
    """OLMo 2 normalizes queries over all heads at once: none of them can go without changing the others."""
    config = AutoConfig.for_model("olmo2", **ARCHITECTURES["llama"][1])
    module = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigError, match="no heads found that could be removed"):
        find_layers(module, TOKENS[:1])


def test_embeddings_head_and_norms_are_not_touched():
    before, after = tiny_model("llama"), LLMPruner(0.4, NONE).compress(language_model(), bench()).module
    kept = {name: p for name, p in before.named_parameters() if "proj" not in name}
    assert kept
    for name, parameter in kept.items():
        assert torch.equal(after.get_parameter(name), parameter), name


def test_units_with_nothing_behind_them_change_nothing():
    lm = language_model()
    expected = logits(lm.module)
    layer = layers_of(lm.module)[0]
    block = layer.module
    block.mlp.down_proj.weight[:, [3, 17]] = 0
    block.self_attn.o_proj.weight[:, 16:] = 0
    reference = logits(lm.module)
    assert not torch.allclose(reference, expected)
    kept = torch.ones(64, dtype=torch.bool)
    kept[[3, 17]] = False
    layer.remove("channels", kept)
    layer.remove("heads", torch.tensor([True, False]))
    torch.testing.assert_close(logits(lm.module), reference)


# --------------------------------------------------------------------------------------------------- how much


def described(shape, module="llama"):
    """Layers of a model on no device: their widths are enough to count."""
    from accelerate import init_empty_weights

    config = AutoConfig.for_model(module, **shape)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    small = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            module, **{**shape, "num_hidden_layers": 1, "vocab_size": 97, "hidden_size": 64, "head_dim": 8}
        )
    )
    found = find_layers(small.requires_grad_(False).eval(), TOKENS[:1])[0].units
    layers = []
    for index, block in enumerate(model.model.layers):
        units = {}
        for kind, known in found.items():
            widths = {n: block.get_submodule(n).out_features for n in known.rows}
            columns = block.get_submodule(known.reader).in_features
            each = {n: torch.arange(w) // (w // known.count) for n, w in widths.items()}
            number = torch.arange(columns) // (columns // known.count)
            units[kind] = type(known)(kind, known.count, each, each, known.reader, number, known.owner, known.queries)
        weights = sum(linear.weight.numel() for linear in block.modules() if isinstance(linear, nn.Linear))
        layers.append(Layer(f"model.layers.{index}", block, units, weights))
    return model, layers


@pytest.mark.parametrize(
    ("shape", "pruned", "published"),
    [
        (  # TinyLlama, blocks 4 to 17
            {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
            | {"num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False},
            (4, 18),
            945_907_712,
        ),
        (  # LLaMA-7B, blocks 4 to 29: the paper's 5.42 B
            {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
            | {"num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False},
            (4, 30),
            5_422_977_024,
        ),
        (  # Llama-3-8B, blocks 4 to 29
            {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
            | {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
            (4, 30),
            6_612_586_496,
        ),
    ],
)
def test_the_paper_s_share_gives_the_published_parameter_counts(shape, pruned, published):
    model, layers = described(shape)
    first, last = pruned
    blocks = len(layers)
    extent = Extent(0.25 * (last - first) / blocks, first / blocks, (blocks - last) / blocks, True, fill=False)
    assert extent.chosen(layers) == layers[first:last]
    gone = 0
    for layer, count in zip(extent.chosen(layers), extent.counts(layers), strict=True):
        gone += sum(count[kind] * units.weights_each(layer.module) for kind, units in layer.units.items())
    assert sum(p.numel() for p in model.parameters()) - gone == published


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("name", ["llama", "llama_all_heads", "opt", "phi3", "falcon_old"])
def test_channels_make_up_for_whole_heads(sparsity, name):
    """With filling the share is met to within half a channel of each block."""
    layers = layers_of(tiny_model(name), name)
    extent = Extent(sparsity, 0, 0, True, fill=True)
    for layer, count in zip(layers, extent.counts(layers), strict=True):
        each = {kind: units.weights_each(layer.module) for kind, units in layer.units.items()}
        gone = sum(count[kind] * each[kind] for kind in count)
        assert abs(gone - sparsity * layer.weights) <= each["channels"] / 2


@pytest.mark.parametrize("round_to", [1, 8, 16])
def test_widths_are_multiples_where_that_is_asked_for(round_to):
    layers = layers_of(tiny_model("llama"))
    for count in Extent(0.3, 0, 0, True, True, round_to).counts(layers):
        assert (64 - count["channels"]) % round_to == 0
        assert 0 <= count["channels"] < 64


def test_a_share_that_removes_nothing_or_too_much_is_refused():
    layers = layers_of(tiny_model("llama"))
    with pytest.raises(ConfigError, match="removes no head and no channel"):
        Extent(0.001, 0, 0, True, fill=True).counts(layers)
    with pytest.raises(ConfigError, match=r"sparsity=0.7: the 2 blocks that are pruned hold 0.667"):
        Extent(0.7, 0.3, 0, True, fill=True).counts(layers)
    with pytest.raises(ConfigError, match="would lose all of its 64 channels"):
        Extent(0.95, 0, 0, False, fill=True).counts(find_layers(tiny_model("llama"), TOKENS[:1], heads=False))
    with pytest.raises(ConfigError, match="leave none of 3 blocks"):
        Extent(0.2, 0.5, 0.5, True, fill=True).chosen(layers)


@pytest.mark.parametrize("method", [LLMPruner, LoRAPrune, GUM])
@pytest.mark.parametrize("sparsity", [0, 1.2, "2:4"])
def test_bad_sparsity_is_refused_before_anything_is_loaded(method, sparsity):
    with pytest.raises(ConfigError, match=f"sparsity={sparsity}"):
        method(sparsity, TrainingSettings(steps=4, learning_rate=1e-3))


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        (LLMPruner, {"importance": "taylor"}, "importance=taylor"),
        (LLMPruner, {"aggregate": "median"}, "aggregate=median"),
        (LLMPruner, {"scope": "row"}, "scope=row"),
        (LLMPruner, {"rounds": 0}, "rounds=0"),
        (LLMPruner, {"tokens": 1}, "tokens=1"),
        (LLMPruner, {"round_to": 0}, "round_to=0"),
        (LLMPruner, {"keep_first": 1.0}, "keep_first=1"),
        (LoRAPrune, {"power": 3}, "power=3"),
        (LoRAPrune, {"smoothing": 1.0}, "smoothing=1"),
        (LoRAPrune, {"warmup_share": 0.6, "cooldown_share": 0.4}, "must leave steps"),
        (LoRAPrune, {"training": NONE}, "importance comes from training"),
        (GUM, {"training": NONE}, "scores come from training"),
        (GUM, {"forgetting": 0.0}, "forgetting=0"),
        (GUM, {"warmup_share": 0.25}, "warmup_share=0.25"),
        (GUM, {"uniqueness": -1.0}, "uniqueness=-1"),
    ],
)
def test_bad_settings_are_refused(method, values, message):
    with pytest.raises(ConfigError, match=message):
        method(**{"sparsity": 0.2, "training": TrainingSettings(steps=4, learning_rate=1e-3), **values})


# -------------------------------------------------------------------------------------------------- artifacts


@pytest.fixture
def uneven(trained, bench):
    """The trained tiny model with layers of their own widths."""
    layers = find_layers(trained.module, torch.arange(9)[None])
    layers[0].remove("heads", torch.tensor([False, True]))
    layers[0].remove("channels", torch.arange(128) >= 20)
    layers[1].remove("channels", torch.arange(128) >= 31)
    return rebuilt(trained, layers)


def test_uneven_models_come_back_bit_for_bit_and_answer_with_a_cache(uneven, tmp_path):
    artifact.save(uneven, tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["model_type"] == MODEL_TYPE
    assert [layer["key_value_heads"] for layer in config["uneven_layers"]] == [1, 2]
    assert not list(tmp_path.rglob("*.bin"))
    loaded = artifact.load(tmp_path / "first", "cpu", torch.float32)
    artifact.save(loaded, tmp_path / "second")
    again = artifact.load(tmp_path / "second", "cpu", torch.float32)
    tokens = torch.arange(24).view(2, 12)
    for (name, one), two in zip(loaded.module.state_dict().items(), again.module.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert torch.equal(loaded.engine.score(tokens), again.engine.score(tokens))
    assert loaded.module.get_output_embeddings().weight is loaded.module.get_input_embeddings().weight
    cached = torch.stack(list(loaded.engine.generate(tokens, 8)), 1)
    written = tokens
    for _ in range(8):
        written = torch.cat([written, loaded.module(written, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, written[:, 12:])
    bytes_each = loaded.engine.kv_cache_bytes_per_token(torch.bfloat16)
    assert bytes_each == analytic_kv_bytes_per_token(loaded.module, torch.bfloat16) == 2 * (1 + 2) * 16 * 2


def test_transformers_loads_uneven_models_once_the_classes_are_there(uneven, tmp_path):
    artifact.save(uneven, tmp_path)
    tokens = torch.arange(24).view(2, 12)
    expected = logits(artifact.load(tmp_path, "cpu", torch.float32).module, tokens)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(loaded).__name__ == "UnevenLlamaForCausalLM"
    assert torch.equal(logits(loaded, tokens), expected)


def test_a_configuration_that_names_no_architecture_is_refused():
    with pytest.raises(RunError, match="lacks dense_model_type"):
        UnevenConfig.from_dict({"model_type": MODEL_TYPE})


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(torch.arange(24).view(2, 12)).logits, sys.argv[2])
assert not any(name.startswith(("methods", "harness")) for name in sys.modules)
print(type(model).__name__)
"""


def test_even_models_load_in_plain_transformers(trained, tmp_path):
    """A process that knows nothing of this project gets the same logits."""
    layers = find_layers(trained.module, torch.arange(9)[None])
    for layer in layers:
        layer.remove("heads", torch.tensor([True, False]))
        layer.remove("channels", torch.arange(128) >= 40)
    artifact.save(rebuilt(trained, layers), tmp_path / "saved")
    ours = artifact.load(tmp_path / "saved", "cpu", torch.float32).module
    assert (ours.config.num_attention_heads, ours.config.num_key_value_heads, ours.config.head_dim) == (2, 1, 16)
    assert ours.config.intermediate_size == 88
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "saved"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LlamaForCausalLM"]
    expected = logits(ours, torch.arange(24).view(2, 12))
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_llama_with_a_width_its_heads_do_not_divide_becomes_mistral():
    lm = language_model("llama_all_heads")
    layers = layers_of(lm.module)
    for layer in layers:
        layer.remove("heads", torch.tensor([True, False, True, True]))
    expected = logits(lm.module)
    after = rebuilt(lm, layers).module
    assert type(after).__name__ == "MistralForCausalLM"
    assert after.config.sliding_window is None
    assert torch.equal(logits(after), expected)


def test_a_model_can_be_pruned_twice():
    once = LLMPruner(0.2, NONE, keep_first=0.3).compress(language_model(), bench())
    twice = LLMPruner(0.2, NONE, keep_last=0.3).compress(once, bench())
    assert type(twice.module).__name__ == "UnevenLlamaForCausalLM"
    assert logits(twice.module).isfinite().all()
    assert sum(p.numel() for p in twice.module.parameters()) < sum(p.numel() for p in tiny_model("llama").parameters())


def test_what_was_pruned_can_be_quantized(trained, tmp_path, bench):
    from methods.quantization.grids import IntegerGrid
    from methods.quantization.round_to_nearest import RoundToNearest

    layers = find_layers(trained.module, torch.arange(9)[None])
    layers[0].remove("channels", torch.arange(128) >= 64)
    done = RoundToNearest(IntegerGrid(4, group_size=None)).compress(rebuilt(trained, layers), bench)
    tokens = torch.arange(24).view(2, 12)
    expected = done.engine.score(tokens)
    artifact.save(done, tmp_path)
    assert torch.equal(artifact.load(tmp_path, "cpu", torch.float32).engine.score(tokens), expected)


# ------------------------------------------------------------------------------------------------- LLM-Pruner


@pytest.mark.parametrize("importance", ["vector", "element_first", "element_second", "element_mixed"])
def test_importance_is_the_sum_over_the_slices_of_a_group(importance):
    """Against loops over single weights and gradients of single windows."""
    module = tiny_model("llama")
    layer = layers_of(module)[1]
    method = LLMPruner(0.2, NONE, importance=importance)
    scores = method.scores(module, [layer], TOKENS, None)[0]
    block = layer.module
    mlp = {"gate": block.mlp.gate_proj, "up": block.mlp.up_proj, "down": block.mlp.down_proj}
    attention = {n: getattr(block.self_attn, f"{n}_proj") for n in "qkvo"}
    weights = [linear.weight.requires_grad_(True) for linear in (*mlp.values(), *attention.values())]
    samples = [torch.autograd.grad(language_modeling_loss(module, window[None]), weights) for window in TOKENS]
    value = {}
    for name, weight, *grads in zip((*mlp, *attention), weights, *samples, strict=True):
        g, fisher, w = sum(grads) / 2, sum(x * x for x in grads) / 2, weight.detach()
        value[name] = {
            "vector": w * g,
            "element_first": (w * g).abs(),
            "element_second": w * w * fisher,
            "element_mixed": (w * g - w * w * fisher / 2).abs(),
        }[importance]

    def lines(name, numbers):
        matrix = value[name] if name not in ("down", "o") else value[name].T
        return sum(float(abs(matrix[n].sum())) for n in numbers)

    for channel in (0, 5, 63):
        expected = sum(lines(name, [channel]) for name in mlp)
        assert float(scores["channels"][channel]) == pytest.approx(expected, rel=1e-4)
    for head in (0, 1):  # 8 wide, two queries for each key
        small, large = range(8 * head, 8 * head + 8), range(16 * head, 16 * head + 16)
        expected = lines("q", large) + lines("k", small) + lines("v", small) + lines("o", large)
        assert float(scores["heads"][head]) == pytest.approx(expected, rel=1e-4)


def exact_loss(module):
    """The mean loss in float64; transformers' own is float32."""
    return nn.functional.cross_entropy(logits(module)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def test_the_first_order_is_what_the_loss_does():
    """Fading a channel by a hair changes the loss by its signed first-order term: the expansion has the right sign."""
    module = tiny_model("llama").double()
    layer = layers_of(module)[1]
    weights = {n: layer.module.get_submodule(n).weight for n in ("mlp.down_proj",)}
    gradients, _ = loss_gradients(module, weights, TOKENS, squares=False)
    predicted = (weights["mlp.down_proj"].detach() * gradients["mlp.down_proj"]).sum(0)
    units, hair = layer.units["channels"], 0.02  # Llama's norms round to float32: no smaller
    for channel in predicted.abs().argsort()[-5:].tolist():
        losses = []
        for fade in (hair, -hair):
            factor = torch.ones(64, dtype=torch.float64)
            factor[channel] -= fade
            with masking([(layer.module, units, factor)]):
                losses.append(float(exact_loss(module)))
        change = (losses[0] - losses[1]) / (2 * hair)
        assert change == pytest.approx(-float(predicted[channel]), rel=1e-2)


def test_masked_loss_ranks_channels_as_importance_does():
    """Exact loss differences of removing each channel alone correlate with the estimate: it is no noise."""
    module = tiny_model("llama").double()
    layer = layers_of(module)[1]
    estimate = LLMPruner(0.2, NONE, importance="element_second").scores(module, [layer], TOKENS, None)[0]["channels"]
    with torch.no_grad():
        full = exact_loss(module)
        exact = []
        for channel in range(64):
            with masking([(layer.module, layer.units["channels"], (torch.arange(64) != channel).double())]):
                exact.append(float((exact_loss(module) - full).abs()))
    ranks = torch.stack([estimate.double().argsort().argsort(), torch.tensor(exact).argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.4


def test_l2_is_the_sum_of_squares():
    module = tiny_model("opt")
    layer = layers_of(module)[0]
    scores = LLMPruner(0.2, NONE, importance="l2").scores(module, [layer], TOKENS, None)[0]["channels"]
    expected = layer.module.fc1.weight.square().sum(1) + layer.module.fc2.weight.square().sum(0)
    torch.testing.assert_close(scores, expected)


def test_matrices_stored_as_one_count_as_so_many():
    """Phi-3 stores queries, keys and values in one matrix, Llama in three: the same weights, the same scores."""
    fused, split = tiny_model("phi3"), tiny_model("llama")
    one, two = layers_of(fused)[0], layers_of(split)[0]
    for linear, parts in (
        (
            one.module.self_attn.qkv_proj,
            [two.module.self_attn.q_proj, two.module.self_attn.k_proj, two.module.self_attn.v_proj],
        ),
        (one.module.mlp.gate_up_proj, [two.module.mlp.gate_proj, two.module.mlp.up_proj]),
        (one.module.self_attn.o_proj, [two.module.self_attn.o_proj]),
        (one.module.mlp.down_proj, [two.module.mlp.down_proj]),
    ):
        linear.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    for kind in ("heads", "channels"):
        tables = [
            matrix_scores(layer.units[kind], lambda n, b=layer.module: b.get_submodule(n).weight.abs(), False)
            for layer in (one, two)
        ]
        torch.testing.assert_close(*tables)
        assert len(tables[0]) == (4 if kind == "heads" else 3)


def test_aggregates():
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = {"sum": [4, 6], "mean": [2, 3], "max": [3, 4], "product": [3, 8], "last": [3, 4]}
    assert {name: aggregate(table).tolist() for name, aggregate in AGGREGATES.items()} == expected


def test_vector_importance_of_normalized_queries_is_nothing_and_element_wise_is_not():
    """Qwen3 normalizes each head's query: its scale does not matter, so w · ∂L/∂w sums to zero over a head."""
    module = tiny_model("qwen3").double()
    weights = {"q": module.model.layers[1].self_attn.q_proj.weight}
    gradients, _ = loss_gradients(module, weights, TOKENS, squares=False)
    signed = element_importance(weights["q"], gradients["q"], None, "vector")
    heads = signed.view(4, -1).sum(1).abs()
    assert (heads < 1e-4 * signed.abs().view(4, -1).sum(1)).all()


def test_permuted_channels_have_permuted_scores_and_leave_the_same_function():
    one, two = tiny_model("llama").double(), tiny_model("llama").double()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    mlp = two.model.layers[0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = nn.Parameter(linear.weight[order], requires_grad=False)
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, order], requires_grad=False)
    results = []
    for module in (one, two):
        lm = LanguageModel(module, None, TransformersEngine(module))
        results.append(logits(LLMPruner(0.3, NONE, windows=None, tokens=None).compress(lm, bench()).module))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_every_round_removes_its_part_and_all_make_the_whole():
    once, often = (LLMPruner(0.4, NONE, rounds=rounds).compress(language_model(), bench()).module for rounds in (1, 4))
    shapes = [{name: tuple(p.shape) for name, p in module.named_parameters()} for module in (once, often)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("rounds", [1, 4])
def test_over_the_whole_model_the_same_number_goes_and_no_block_loses_all(rounds):
    widths = {}
    for scope in ("model", "block"):
        done = LLMPruner(0.4, NONE, scope=scope, rounds=rounds).compress(language_model(), bench()).module
        widths[scope] = [block.mlp.down_proj.in_features for block in done.model.layers]
    assert sum(widths["model"]) == sum(widths["block"])
    assert len(set(widths["model"])) > 1
    assert min(widths["model"]) > 0


def test_importance_that_is_no_number_ends_the_run():
    lm = language_model()
    lm.module.lm_head.weight.data[3] = torch.nan
    with pytest.raises(RunError, match=r"layers\.0: importances .* not finite"):
        LLMPruner(0.4, NONE).compress(lm, bench())


def test_first_and_last_blocks_stay():
    done = LLMPruner(0.2, NONE, keep_first=0.3, keep_last=0.3).compress(language_model(), bench()).module
    before = tiny_model("llama")
    for index, same in enumerate((True, False, True)):
        shapes = [module.model.layers[index].mlp.down_proj.weight.shape for module in (done, before)]
        assert (shapes[0] == shapes[1]) == same


def test_importance_beats_chance_on_the_calibration_text(trained_folder, generated_corpus, tmp_path):
    losses = {}
    for importance in ("element_first", "random"):
        lm = artifact.load(trained_folder, "cpu", torch.float32)
        run = Bench(generated_corpus, torch.Generator().manual_seed(0), tmp_path, NoProgress())
        done = LLMPruner(0.3, NONE, importance=importance).compress(lm, run)
        windows = generated_corpus.calibration_windows(lm.tokenizer, torch.Generator().manual_seed(1))
        losses[importance] = float(done.engine.score(windows).mean())
    assert losses["element_first"] < losses["random"]


def test_recovery_lowers_the_loss_and_leaves_plain_linears(trained_folder, generated_corpus, tmp_path):
    losses = []
    for steps in (0, 20):
        lm = artifact.load(trained_folder, "cpu", torch.float32)
        run = Bench(generated_corpus, torch.Generator().manual_seed(0), tmp_path / str(steps), NoProgress())
        done = LLMPruner(0.4, TrainingSettings(steps=steps, learning_rate=3e-3)).compress(lm, run)
        held_out = generated_corpus.evaluation_tokens(lm.tokenizer)[:1024].view(16, 64)
        losses.append(float(done.engine.score(held_out).mean()))
        assert all(type(linear) is nn.Linear for linear in block_linears(done.module).values())
        assert run.log.tokens == steps * 64
    assert losses[1] < losses[0]


# -------------------------------------------------------------------------------------------------- LoRAPrune


def test_with_identity_and_zero_factors_the_estimate_is_the_gradient():
    """A = I, B = 0: Ĝ = γ · ∂L/∂W, exactly (T-LR1)."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, dtype=torch.float64)
    layer = LowRankLinear(nn.Linear(6, 5), 5, scaling=0.25)
    layer.inner, layer.rank = linear, 6
    layer.left, layer.right = nn.Parameter(torch.zeros(5, 6).double()), nn.Parameter(torch.eye(6).double())
    layer.factor_dtype = torch.float64
    x, target = torch.randn(7, 6).double(), torch.randn(7, 5).double()
    (layer(x) - target).square().sum().backward()
    torch.testing.assert_close(estimated_gradient(layer), 0.25 * linear.weight.grad)


def test_the_estimate_is_the_change_of_the_product_by_a_step_of_one():
    torch.manual_seed(0)
    layer = LowRankLinear.from_factors(nn.Linear(6, 5), torch.randn(5, 2), torch.randn(2, 6), dtype=torch.float32)
    layer.left.grad, layer.right.grad = torch.randn(5, 2), torch.randn(2, 6)
    before = layer.left @ layer.right
    after = (layer.left - layer.left.grad) @ (layer.right - layer.right.grad)
    torch.testing.assert_close(estimated_gradient(layer), before - after)


def test_the_schedule_starts_at_nothing_ends_with_all_and_never_falls():
    shares = [cubic_progress(step, 100, 10, 10) for step in range(101)]
    assert shares[:11] == [0.0] * 11
    assert shares[90:] == [1.0] * 11
    assert shares == sorted(shares)
    assert cubic_progress(50, 100, 10, 10) == pytest.approx(1 - 0.5**3)


def gradual(smoothing=0.9, **settings):
    module = tiny_model("llama")
    layers = layers_of(module)
    adapters = add_adapters(module, block_linears(module), 4, 8.0, torch.float32, 0)
    method = LoRAPrune(0.4, TrainingSettings(steps=20, learning_rate=1e-3), smoothing=smoothing, **settings)
    counts = Extent(0.4, 0, 0, True, True).counts(layers)
    pruning = GradualPruning(method, layers, counts, torch.device("cpu"), torch.Generator().manual_seed(0))
    for adapter in adapters.values():
        adapter.train_factors()
    return module, adapters, pruning


def backward(module, tokens=TOKENS):
    with torch.enable_grad():
        language_modeling_loss(module, tokens).backward()


def test_no_smoothing_is_the_last_step_and_equal_steps_are_a_fixed_point():
    module, _, pruning = gradual(smoothing=0.0)
    backward(module)
    with torch.no_grad():
        pruning.observe()
        last = [slot.importance.clone() for slot in pruning.slots]
        pruning.observe()
    for slot, expected in zip(pruning.slots, last, strict=True):
        torch.testing.assert_close(slot.importance, expected)
    pruning.method = replace(pruning.method, smoothing=0.9)
    with torch.no_grad():
        pruning.observe()
    for slot, expected in zip(pruning.slots, last, strict=True):
        torch.testing.assert_close(slot.importance, expected)


def test_a_step_without_numbers_is_left_out():
    module, adapters, pruning = gradual()
    backward(module)
    with torch.no_grad():
        pruning.observe()
    before = [slot.importance.clone() for slot in pruning.slots]
    next(iter(adapters.values())).left.grad.fill_(torch.nan)
    with torch.no_grad():
        pruning.observe()
    assert all(torch.equal(slot.importance, b) for slot, b in zip(pruning.slots, before, strict=True))


def test_masks_are_nested_and_end_at_the_counts():
    _, _, pruning = gradual()
    before = [slot.mask.clone() for slot in pruning.slots]
    for share in (0.3, 0.3, 0.7, 1.0):
        for slot in pruning.slots:
            slot.importance.copy_(torch.rand(slot.units.count))  # whatever importance says, what is gone stays gone
        pruning.prune(share)
        for slot, earlier in zip(pruning.slots, before, strict=True):
            assert not ((earlier == 0) & (slot.mask == 1)).any()
            assert int((slot.mask == 0).sum()) == int(slot.removed * share + 1e-6)
        before = [slot.mask.clone() for slot in pruning.slots]


def test_merged_and_sliced_is_masked_and_unmerged():
    module, adapters, pruning = gradual()
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters.values():
        adapter.left.data.normal_(0, 0.1, generator=generator)
    for slot in pruning.slots:
        slot.importance.copy_(torch.rand(slot.units.count, generator=generator))
    pruning.prune(1.0)
    with masking([(slot.layer.module, slot.units, slot.mask) for slot in pruning.slots]):
        expected = logits(module)
    merge_adapters(module, adapters)
    for slot in pruning.slots:
        slot.layer.remove(slot.units.kind, slot.mask.bool())
    torch.testing.assert_close(logits(module), expected, rtol=1e-4, atol=1e-5)


def test_loraprune_removes_what_was_asked_for_and_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    """Interrupted after two thirds and run again: the same model, bit for bit, masks and averages included."""

    class Killed(Exception):
        pass

    settings = {"steps": 12, "learning_rate": 1e-2, "checkpoint_steps": 4}
    method = LoRAPrune(0.4, TrainingSettings(**settings), prune_every=2, keep_first=0, keep_last=0, rank=4)
    whole = method.compress(language_model(), bench(tmp_path / "whole")).module
    lm = language_model()
    original, calls = GradualPruning.before_step, []

    def killing(self):
        calls.append(1)
        if len(calls) == 10:
            raise Killed
        original(self)

    monkeypatch.setattr(GradualPruning, "before_step", killing)
    with pytest.raises(Killed):
        method.compress(lm, bench(tmp_path / "killed"))
    monkeypatch.undo()
    again = method.compress(language_model(), bench(tmp_path / "killed")).module
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    gone = 1 - sum(x.weight.numel() for x in block_linears(whole).values()) / sum(
        x.weight.numel() for x in block_linears(tiny_model("llama")).values()
    )
    assert gone == pytest.approx(0.4, abs=0.01)


def test_before_step_sees_whole_gradients_of_an_accumulated_batch(tmp_path):
    from methods.training import train

    module = tiny_model("llama")
    weight = module.model.layers[0].mlp.down_proj.weight
    windows = tiny_tokens(2, 12)
    seen = []
    settings = TrainingSettings(steps=1, learning_rate=1e-3, gradient_accumulation=2, maximum_gradient_norm=1e9)
    train(
        module,
        [weight],
        windows,
        language_modeling_loss,
        settings,
        bench(tmp_path),
        "test",
        before_step=lambda: seen.append(weight.grad.clone()),
    )
    fresh = tiny_model("llama")
    expected, _ = loss_gradients(fresh, {"w": fresh.model.layers[0].mlp.down_proj.weight}, windows, squares=False)
    torch.testing.assert_close(seen[0], expected["w"], rtol=1e-4, atol=1e-7)


# -------------------------------------------------------------------------------------------------------- GUM


def pruned_globally(name="llama", sparsity=0.3, steps=20, **settings):
    module = tiny_model(name)
    layers = find_layers(module, TOKENS[:1], heads=False)
    method = GUM(sparsity, TrainingSettings(steps=steps, learning_rate=1e-3), **settings)
    gone = removed_neurons(layers, sparsity)
    return module, layers, GlobalPruning(method, layers, gone, torch.device("cpu"), torch.Generator().manual_seed(0))


def test_the_highest_scores_of_all_layers_together_stay():
    _, _, pruning = pruned_globally()
    pruning.scores.data = torch.randn(3 * 64, generator=torch.Generator().manual_seed(1))
    masks = torch.cat(pruning.masks(1.0)).bool()
    assert int((~masks).sum()) == pruning.removed
    assert pruning.scores[masks].min() > pruning.scores[~masks].max()
    assert len({int(mask.sum()) for mask in pruning.masks(1.0)}) > 1


@pytest.mark.parametrize("name", ["llama", "opt", "phi3", "gpt_neox"])
def test_the_gradient_of_a_factor_is_the_sum_over_the_neuron_s_weights(name):
    """∂L/∂m = Σ w · ∂L/∂w over rows, their biases and columns: what the paper puts straight through."""
    module = tiny_model(name).double()
    layer = find_layers(module, TOKENS[:1], heads=False)[1]
    units = layer.units["channels"]
    factor = torch.ones(units.count, dtype=torch.float64, requires_grad=True)
    parameters = {}
    for linear in units.rows:
        writer = layer.module.get_submodule(linear)
        parameters[linear, "weight"] = writer.weight
        if writer.bias is not None:
            parameters[linear, "bias"] = writer.bias
    reader = layer.module.get_submodule(units.reader).weight
    for parameter in (*parameters.values(), reader):
        parameter.requires_grad_(True)
    with multiplying([layer], [factor]):
        language_modeling_loss(module, TOKENS).backward()
    expected = (reader * reader.grad).sum(0)
    for (linear, _), parameter in parameters.items():
        product = (parameter * parameter.grad).flatten(1).sum(1) if parameter.ndim > 1 else parameter * parameter.grad
        expected = expected.index_add(0, units.rows[linear], product)
    torch.testing.assert_close(factor.grad, expected, rtol=1e-5, atol=1e-9)


def test_sensitivity_is_the_mean_of_absolute_sums():
    module = tiny_model("opt").double()
    layers = find_layers(module, TOKENS[:1], heads=False)
    found = gum.sensitivity(module, layers, [torch.ones(64).double()] * 3, TOKENS)[1]
    block = module.model.decoder.layers[1]
    parts = [block.fc1.weight, block.fc1.bias, block.fc2.weight]
    expected = torch.zeros(64, dtype=torch.float64)
    for part in parts:
        part.requires_grad_(True)
    for window in TOKENS:
        grads = torch.autograd.grad(language_modeling_loss(module, window[None]), parts)
        rows, bias, columns = ((p * g).detach() for p, g in zip(parts, grads, strict=True))
        expected += (rows.sum(1) + bias + columns.sum(0)).abs() / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-10)


def test_orthogonal_neurons_are_unique_and_copies_are_not():
    outputs = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    assert not similarity(outputs.T @ outputs).any()
    copies = torch.tensor([[1.0, -2.0, 0.0], [2.0, -4.0, 0.0], [0.0, 0.0, 1.0]])
    alike = similarity(copies.T @ copies)
    assert float(alike[0, 1]) == pytest.approx(1, abs=1e-5)  # the sign does not matter
    assert not alike[2].any()


def test_a_copied_neuron_is_not_unique():
    module = tiny_model("llama")
    layers = find_layers(module, TOKENS[:1], heads=False)
    mlp = module.model.layers[0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight[1] = linear.weight[0]
    everything = [torch.ones(64) for _ in layers]
    unique = gum.uniqueness(module, layers, everything, tiny_tokens(8, 16))[0]
    assert not unique[:2].any()
    assert unique.any()
    without = [everything[0].clone().index_fill_(0, torch.tensor([1]), 0.0), *everything[1:]]
    again = gum.uniqueness(module, layers, without, tiny_tokens(8, 16))[0]
    assert not again[1]  # what is gone does not count
    assert again.sum() >= unique.sum()


def test_similar_neurons_are_pulled_down_harder():
    """The pull on the score of a copy is greater than on that of a neuron like no other."""
    module, _, pruning = pruned_globally(uniqueness=5.0, movement=100.0, forgetting=1.0)
    mlp = module.model.layers[0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight[1:32] = linear.weight[0]
    mlp.down_proj.weight[:] = 0  # the text's loss says nothing about this layer
    pruning.scores.requires_grad_(True)
    with torch.enable_grad():
        pruning.loss(module, TOKENS).backward()
    pulls = pruning.scores.grad[:64]
    assert pulls[:32].min() > pulls[32:].max() > 0


def test_without_similarity_the_pull_is_that_of_movement_pruning():
    one, two = (pruned_globally(uniqueness=u)[2] for u in (0.0, 1.0))
    for pruning in (one, two):
        pruning.scores.data.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(2))
    losses = []
    for pruning in (one, two):
        module = tiny_model("llama")
        pruning.layers = find_layers(module, TOKENS[:1], heads=False)
        for layer in pruning.layers:
            layer.module.mlp.up_proj.weight.zero_()  # all outputs are nothing: no neuron is like another
        losses.append(float(pruning.loss(module, TOKENS)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_all_stay_during_the_warm_up_and_the_end_is_constant():
    _, _, pruning = pruned_globally(steps=40)
    gone = []
    for step in range(41):
        pruning.step.fill_(step)
        gone.append(int(sum((mask == 0).sum() for mask in pruning.masks(pruning.progress()))))
    assert gone[:5] == [0] * 5
    assert gone[28:] == [pruning.removed] * 13
    assert gone == sorted(gone)


def test_gum_slices_what_it_masked_and_a_layer_may_lose_all(tmp_path):
    """Scores that stay (Gradual Random), one layer's all lowest: it is left with its output bias alone."""
    lm = language_model("opt")
    layers = find_layers(lm.module, TOKENS[:1], heads=False)
    kept = [torch.zeros(64, dtype=torch.bool), torch.arange(64) < 40, torch.ones(64, dtype=torch.bool)]
    with multiplying(layers, [mask.float() for mask in kept]):
        expected = logits(lm.module)
    for layer, mask in zip(layers, kept, strict=True):
        layer.remove("channels", mask)
    after = rebuilt(lm, layers)
    torch.testing.assert_close(logits(after.module), expected, rtol=1e-4, atol=1e-5)
    assert after.module.model.decoder.layers[0].fc2.weight.shape == (32, 0)
    state = after.module.state_dict()
    from safetensors.torch import load_file, save_file

    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_gum_meets_its_share_and_learns(trained_folder, generated_corpus, tmp_path):
    losses = {}
    for importance in ("movement", "random"):
        lm = artifact.load(trained_folder, "cpu", torch.float32)
        before = sum(linear.weight.numel() for linear in block_linears(lm.module).values())
        run = Bench(
            generated_corpus, torch.Generator().manual_seed(0), tmp_path / importance, NoProgress(), TrainingLog()
        )
        method = GUM(0.3, TrainingSettings(steps=40, learning_rate=1e-3), importance=importance, watched_windows=2)
        done = method.compress(lm, run)
        left = sum(linear.weight.numel() for linear in block_linears(done.module).values())
        assert 1 - left / before == pytest.approx(0.3, abs=0.002)
        assert set(run.log.curves["mean sensitivity of kept neurons"]) == {0, 40}
        held_out = generated_corpus.evaluation_tokens(lm.tokenizer)[:1024].view(16, 64)
        losses[importance] = float(done.engine.score(held_out).mean())
    assert all(loss < 5 for loss in losses.values())


def test_gum_keeps_what_it_learned_of_a_model_that_came_in_bfloat16(tmp_path):
    method = GUM(0.3, TrainingSettings(steps=2, learning_rate=1e-4), importance="random", watched_windows=0)
    lm = language_model()
    for parameter in lm.module.parameters():  # as a model is loaded: rotary frequencies stay exact
        parameter.data = parameter.data.bfloat16()
    done = method.compress(lm, bench(tmp_path)).module
    weight = done.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(weight, weight.bfloat16().to(weight.dtype))


def test_gum_refuses_more_than_feed_forward_layers_hold():
    layers = find_layers(tiny_model("llama"), TOKENS[:1], heads=False)
    with pytest.raises(ConfigError, match=r"sparsity=0.8: .* all hold 0.667"):
        removed_neurons(layers, 0.8)
