"""SmolLM2-135M in transformers' own forward: what errors of its weights do, and what other weights do to its predictions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from flexgen_helm.assets.helm_data import news_articles
from flexgen_helm.assets.smollm2 import smollm2_folder
from flexgen_helm.assets.sotu import recent_addresses
from flexgen_helm.cache_folder import cache_folder, write_whole
from flexgen_helm.compression.sensitivity import Sensitivity, SensitivityStatistics, probe

WINDOWS, WINDOW_TOKENS = 6, 1000
RANDOM_SEQUENCES, RANDOM_TOKENS, FIRST_ORDINARY = 4, 512, 10
"""What the statistics see: the end token, then uniform ids that are no special tokens."""
OWN_SEQUENCES, OWN_TOKENS = 16, 512
"""The text that the model writes: sequences, and tokens in each."""
ROWS_TOGETHER = 2
"""Sequences that are differentiated together."""
GRID_COLUMNS, GRID_STEPS = 32, 15
"""The grid on which the weights were published, along the inputs."""
ARTICLES = 40
"""More than are read."""
TEXTS: dict[str, Callable[[], str]] = {
    "addresses": recent_addresses,
    "news": lambda: "\n".join(news_articles()[:ARTICLES]),
}
"""By name. The schemes were chosen on the first; the second was not looked at before they were final."""


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for the text."""

    perplexity: float
    log_probs: list[Tensor]
    """For each window float16 ``[tokens, vocabulary]``: natural logarithms."""


@dataclass(frozen=True)
class Comparison:
    """What a model predicts, against another one."""

    perplexity: float
    divergence: float
    """Mean Kullback-Leibler divergence from the other one, in nats a token."""
    agreement: float
    """Share of the tokens with the same first choice."""


class Subject:
    """The model and the text."""

    def __init__(self, off_grid: bool, text: str = "addresses") -> None:
        """Load them.

        Args:
            off_grid: Whether the weights are moved off the grid on which they were published, by uniform noise of a step.
            text: Name of one of ``TEXTS``.
        """
        self.off_grid = off_grid
        folder = smollm2_folder()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.linears = {
            name: module for name, module in self.model.model.layers.named_modules() if isinstance(module, nn.Linear)
        }
        if off_grid:
            _move_off_grid([linear.weight.data for linear in self.linears.values()])
        self.weights = {name: linear.weight.data.clone() for name, linear in self.linears.items()}
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.end: int = self.tokenizer.eos_token_id
        # The text is longer than the context, of which the tokenizer would warn.
        ids = self.tokenizer(TEXTS[text](), add_special_tokens=False, verbose=False)["input_ids"][: WINDOWS * WINDOW_TOKENS]
        self.windows = torch.tensor(ids).view(WINDOWS, WINDOW_TOKENS)

    def random_ids(self) -> Tensor:
        """Return uniform ids behind the end token, int64 ``[sequences, tokens]``."""
        chance = torch.Generator().manual_seed(0)
        size = (RANDOM_SEQUENCES, RANDOM_TOKENS)
        ids = torch.randint(FIRST_ORDINARY, self.model.config.vocab_size, size, generator=chance)
        ids[:, 0] = self.end
        return ids

    def own_text(self) -> Tensor:
        """Return what the model writes behind the end token, int64 ``[sequences, tokens]``, kept by weights and settings."""
        settings = {"sequences": OWN_SEQUENCES, "tokens": OWN_TOKENS, "temperature": 1, "seed": 0}
        digest = hashlib.sha256(json.dumps(settings).encode())
        for weight in self.weights.values():
            digest.update(weight.numpy().data)
        file = cache_folder() / "own_text" / f"{digest.hexdigest()[:32]}.json"
        if not file.exists():
            write_whole(file, json.dumps(self._write_text().tolist()))
        return torch.tensor(json.loads(file.read_text()))

    def _write_text(self) -> Tensor:
        # No token ends a sequence: behind the end token the model begins another text.
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, max_new_tokens=OWN_TOKENS - 1, pad_token_id=self.end, eos_token_id=None
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            start = torch.full((OWN_SEQUENCES, 1), self.end)
            ids: Tensor = self.model.generate(start, attention_mask=torch.ones_like(start), generation_config=settings)
        return ids

    def sensitivities(self, ids: Tensor) -> dict[str, Sensitivity]:
        """Return what errors of each linear layer do to the output of its decoder layer, over ids ``[sequences, tokens]``."""
        chance = torch.Generator().manual_seed(0)
        statistics = {name: SensitivityStatistics(x.in_features, x.out_features) for name, x in self.linears.items()}
        with _probing(self.model.model.layers, chance), ExitStack() as hooks, torch.enable_grad():
            for name, linear in self.linears.items():
                hooks.callback(linear.register_forward_hook(partial(_observe, statistics[name])).remove)
            for rows in ids.split(ROWS_TOGETHER):
                self.model.model(rows, use_cache=False)
        return {name: own.mean(ids.numel()) for name, own in statistics.items()}

    def use(self, weights: dict[str, Tensor]) -> None:
        """Give the linear layers other weights."""
        for name, linear in self.linears.items():
            linear.weight.data.copy_(weights[name])

    def predict(self) -> Predictions:
        """Predict the text."""
        log_probs = [self._log_probs(window) for window in self.windows]
        losses = [_loss(x, window) for x, window in zip(log_probs, self.windows, strict=True)]
        return Predictions(math.exp(sum(losses) / self.windows.numel()), [x.half() for x in log_probs])

    def compare(self, reference: Predictions) -> Comparison:
        """Predict the text and compare with other predictions of it."""
        loss = divergence = 0.0
        agreement = 0
        for window, expected in zip(self.windows, reference.log_probs, strict=True):
            found, exact = self._log_probs(window), expected.float()
            loss += _loss(found, window)
            divergence += float((exact.exp() * (exact - found)).sum(dtype=torch.float64))
            agreement += int((exact.argmax(1) == found.argmax(1)).sum())
        n = self.windows.numel()
        return Comparison(math.exp(loss / n), divergence / n, agreement / n)

    def _log_probs(self, window: Tensor) -> Tensor:
        ids = torch.cat([torch.tensor([self.end]), window[:-1]])
        logits: Tensor = self.model(ids[None], use_cache=False).logits[0]
        return logits.log_softmax(-1)


@contextmanager
def _probing(layers: nn.ModuleList, chance: torch.Generator) -> Iterator[None]:
    """Compute gradients of probes, each within its layer, while the context lasts."""

    def begin(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].detach().requires_grad_(), *inputs[1:])

    def end(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        (output * probe(output, chance)).sum().backward()
        return output.detach()

    with ExitStack() as hooks:
        for layer in layers:
            layer.requires_grad_(False)
            hooks.callback(layer.register_forward_pre_hook(begin).remove)
            hooks.callback(layer.register_forward_hook(end).remove)
        yield


def _observe(own: SensitivityStatistics, linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    seen = inputs[0].detach().flatten(0, -2)
    output.register_hook(lambda gradient: own.add(seen, gradient.flatten(0, -2)))


def _loss(log_probs: Tensor, window: Tensor) -> float:
    return -float(log_probs.gather(1, window[:, None]).sum(dtype=torch.float64))


def _move_off_grid(weights: list[Tensor]) -> None:
    """Add uniform noise of one step of the grid to each weight, in place."""
    chance = torch.Generator().manual_seed(1234)
    for weight in weights:
        blocks = weight.view(len(weight), -1, GRID_COLUMNS)
        steps = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / GRID_STEPS
        blocks += (torch.rand(blocks.shape, generator=chance) - 0.5) * steps
