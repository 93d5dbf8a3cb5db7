"""Linears that read one tensor are multiplied as one: same numbers, less layers, nothing kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.engines.joined import JoinedLayer, JoinedPart, join_linears
from harness.errors import RunError
from tests.harness.tiny_models import causal_model


class Rows(nn.Linear):
    """A linear that lets itself be joined."""

    def joined(self, others):
        if any(type(other) is not Rows for other in others):
            return None
        made = Rows(self.in_features, sum(layer.out_features for layer in (self, *others)), bias=False)
        made.weight = nn.Parameter(torch.cat([layer.weight.data for layer in (self, *others)]), requires_grad=False)
        return made


def joinable(names=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "o_proj"), cls=Rows):
    model = causal_model().double().requires_grad_(False)
    for name, linear in list(model.named_modules()):
        if name.endswith(tuple(names)):
            linear.__class__ = cls
    return model


def test_linears_of_one_input_are_joined_and_compute_the_same():
    model, ids = joinable(), torch.arange(12).view(2, 6)
    before = model(ids).logits
    groups = join_linears(model)
    assert [[name.rpartition(".")[2] for name in group] for group in groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["gate_proj", "up_proj"],
    ] * 2
    products = []
    for module in model.model.layers.modules():
        if isinstance(module, Rows):
            module.register_forward_hook(lambda *_: products.append(1))
    assert float((model(ids).logits - before).norm()) < 1e-12 * float(before.norm())
    assert len(products) == 2 * 4  # qkv, o, gate and up, down
    wholes = [module for module in model.modules() if isinstance(module, JoinedLayer)]
    assert all(whole._input is None and whole._parts is None for whole in wholes)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in causal_model().parameters())


def test_only_layers_that_offer_it_are_joined():
    model = joinable(("q_proj", "k_proj", "up_proj"))
    assert [len(group) for group in join_linears(model)] == [2, 2]  # q and k; v and gate are plain
    assert not isinstance(model.model.layers[0].mlp.up_proj, JoinedPart)


def test_parts_asked_in_any_order_and_for_other_inputs_are_their_own_products():
    torch.manual_seed(0)
    layers = [Rows(4, width, bias=False).double().requires_grad_(False) for width in (3, 5)]
    whole = JoinedLayer(layers[0].joined(layers[1:]), [3, 5])
    first, second = JoinedPart(whole, 0), JoinedPart(whole, 1)
    x, y = torch.randn(2, 4).double(), torch.randn(1, 4).double()
    for part, layer, given in (
        (second, layers[1], x),
        (first, layers[0], y),  # the other part of x was never asked for
        (first, layers[0], y),
        (second, layers[1], y),
        (first, layers[0], x),
    ):
        torch.testing.assert_close(part(given), layer(given), rtol=1e-14, atol=1e-14)


def test_a_layer_that_joins_wrongly_is_refused():
    class Wrong(Rows):
        def joined(self, others):
            made = Rows(self.in_features, sum(layer.out_features for layer in (self, *others)), bias=False).double()
            return made.requires_grad_(False)

    with pytest.raises(RunError, match="changed what the model computes"):
        join_linears(joinable(cls=Wrong))


def test_a_compiler_traces_joined_layers_as_one_graph():
    model, ids = joinable(), torch.arange(6).view(1, 6)
    before = model(ids).logits
    join_linears(model)
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=keep, dynamic=False, fullgraph=True)
    for _ in range(2):
        assert float((compiled(ids, use_cache=False).logits - before).norm()) < 1e-12 * float(before.norm())
    products = [n for n in graphs[0].graph.nodes if n.op == "call_function" and n.target is torch._C._nn.linear]
    assert len(graphs) == 1
    assert len(products) == 2 * 4 + 1
