"""Gradients of probes against autograd on transformers' own layers, and the text that a model writes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flexgen_helm.compression.matrices import matrix_tensors
from flexgen_helm.compression.schemes import EntropyCoded
from flexgen_helm.compression.sensitivity import probe
from flexgen_helm.errors import CorruptFile, UnsupportedModel
from flexgen_helm.loading.source import ModelSource, open_model
from flexgen_helm.model.experts import sliced_experts
from flexgen_helm.model.layers import layers_of
from flexgen_helm.model.recorder import RecordedModel, Recording
from flexgen_helm.runtime.engine import Engine
from flexgen_helm.runtime.fitting import own_text
from flexgen_helm.runtime.fitting.gradients import Gradients, known_sensitivities, replay_with_gradients, watched
from flexgen_helm.runtime.fitting.statistics import observe_model, random_tokens
from tests.workbench import Workbench


def _source(bench: Workbench, family: str) -> ModelSource:
    return open_model(str(bench.folder(family)), dtype="float32", device=torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mamba2"])
def test_statistics_are_those_of_autograd_within_each_layer(bench: Workbench, tmp_path: Path, family: str) -> None:
    source = _source(bench, family)
    loaded = source.described(source.read())
    model, tokens = loaded.model, random_tokens(loaded)
    found = observe_model(source, EntropyCoded(4.5), tmp_path)
    linears: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    # transformers' own forward goes through all layers with one graph; gradients are cut at the inputs of each layer.
    losses: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for j, layer in enumerate(layers_of(model)):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                module.register_forward_hook(lambda _, x, y, key=f"{j}/{name}.weight/0": linears[key].append((x[0], y)))

        def end(_: nn.Module, inputs: Any, output: Any, j: int = j) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            chance = torch.Generator().manual_seed(j * len(tokens) + len(losses[j]))
            losses[j].append((hidden * probe(hidden, chance)).sum())

        layer.register_forward_hook(end)
    for row in tokens:
        model(row[None], use_cache=False)
    assert found.keys() == linears.keys()
    for key, calls in linears.items():
        j = int(key.partition("/")[0])
        gradients = [
            torch.autograd.grad(loss, y, retain_graph=True)[0][0] for loss, (_, y) in zip(losses[j], calls, strict=True)
        ]
        g = torch.cat(gradients).double()
        x = torch.cat([inputs.detach()[0] for inputs, _ in calls]).double()
        g *= x.any(1, keepdim=True)  # a padding token, whose embedding is 0, counts as padding
        columns, rows = (x.square() * g.square().sum(1, keepdim=True)).mean(0), g.square().mean(0)
        torch.testing.assert_close(found[key]["columns"].double(), columns, rtol=2e-3, atol=1e-9)
        torch.testing.assert_close(found[key]["rows"].double(), rows, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_statistics_of_experts_count_their_own_tokens(bench: Workbench, family: str) -> None:
    layer = layers_of(_source(bench, family).read())[0]
    tensors = [x for x in matrix_tensors(layer) if "experts" in x.module]
    experts: Any = layer.get_submodule(tensors[0].module)
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(200, 64, generator=generator), torch.full((200, 2), 0.5)
    # The last expert sees too few tokens for statistics of its own.
    chosen = torch.stack([torch.arange(200) % 2, torch.full((200,), 2)], 1)
    chosen[:5, 1] = 3
    direction = torch.randn(200, 64, generator=generator)
    with watched(layer, tensors) as seen, torch.enable_grad():
        (sliced_experts(experts, hidden.clone().requires_grad_(), chosen, weights) * direction).sum().backward()
    expected: dict[str, list[tuple[Tensor, Tensor]]] = {"gate_up_proj": [], "down_proj": []}
    for e in range(4):
        own = (chosen == e).any(1)
        calls: dict[str, tuple[Tensor, Tensor]] = {}
        x = hidden[own].clone().requires_grad_()
        for name in expected:
            weight = getattr(experts, name)[e]
            bias = getattr(experts, f"{name}_bias")[e] if experts.has_bias else None
            y = linear(x, weight.T if experts.is_transposed else weight, bias)
            calls[name] = (x, y)
            x = experts._apply_gate(y) if name == "gate_up_proj" else y
        loss = (calls["down_proj"][1] * direction[own] * 0.5).sum()
        for name, (x, y) in calls.items():
            g = torch.autograd.grad(loss, y, retain_graph=True)[0].double()
            squares = g.square().sum(1, keepdim=True)
            expected[name].append(((x.detach().double().square() * squares).sum(0) / 200, g.square().sum(0) / 200))
    for tensor in tensors:
        for e, known in enumerate(seen[tensor.name].means(200)):
            parts = expected[tensor.parameter]
            for which, each in enumerate((known.columns, known.rows)):
                wanted = parts[e][which] if e < 3 else torch.stack([part[which] for part in parts]).mean(0)
                torch.testing.assert_close(each.double(), wanted, rtol=1e-4, atol=1e-9)


def test_a_matrix_without_gradients_matters_as_the_median_of_its_layer() -> None:
    seen = {"silent": Gradients(1, 5, 7), "silent experts": Gradients(2, 5, 7)}
    for gradient in (1.0, 2.0, 3.0):
        seen[str(gradient)] = Gradients(1, 3, 4)
        output = torch.zeros(20, 4, requires_grad=True) * 1
        seen[str(gradient)].watch(0, torch.ones(20, 3), output)
        (output * gradient).sum().backward()
    known = known_sensitivities(seen, 20)
    for gradient in (1.0, 2.0, 3.0):
        assert known[str(gradient)][0].columns.tolist() == [4 * gradient**2] * 3
    # Errors of single weights cost 1, 4 and 9 times their squares.
    for each in (*known["silent"], *known["silent experts"]):
        assert each.columns.tolist() == [7 * 4] * 5
        assert each.rows.tolist() == [1] * 7


def test_layers_without_gradients_are_refused(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def replay(self: RecordedModel, j: int, row: Recording) -> None:
        assert row.hidden is not None
        row.hidden = row.hidden.detach()

    monkeypatch.setattr(RecordedModel, "replay", replay)
    model = RecordedModel(_source(bench, "llama").read())
    with pytest.raises(UnsupportedModel, match=r"Layer 3 cannot be differentiated .* Use `-minmax`"):
        replay_with_gradients(model, 3, Recording(hidden=torch.ones(1, 4, 8)), seed=0)


def test_a_model_writes_its_text_once(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "NUM_ROWS", 3)
    monkeypatch.setattr(own_text, "ROW_TOKENS", 12)
    with Engine.from_pretrained(str(bench.folder("llama")), device="cpu") as engine:
        job = own_text.writing_job(engine._parts.loaded)
        text = own_text.written(job, engine.run([job])[0])
    assert text.shape == (3, 12)
    assert set(text[:, 0].tolist()) == {min(engine._parts.loaded.end_token_ids)}
    assert len({tuple(row) for row in text.tolist()}) == 3
    assert torch.equal(own_text.kept_text(tmp_path, lambda _: text), text)
    assert torch.equal(own_text.kept_text(tmp_path, lambda _: text * 0), text)
    (tmp_path / own_text.FILE).write_bytes(b"torn")
    with pytest.raises(CorruptFile, match=r"own_text\.safetensors cannot be read .* Delete it"):
        own_text.kept_text(tmp_path, lambda _: text)
