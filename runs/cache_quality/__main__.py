"""What compressed K/V and sparse attention lose against the engine as it is, by length of the text.

The beginning of the addresses of 2024 and 2026 is read in one window of each length, after the end token. KL is the mean
Kullback-Leibler divergence from the uncompressed engine in nats a token, top-1 the share of tokens with the same most likely
next token. Bits are those of an element of K or V as stored, on average, scales and means counted. The 95 % interval of the
mean KL is a bootstrap over blocks of consecutive tokens, because what one token loses depends on what its neighbours lose.
Cost: half a minute of processor time a variant for 2,000 tokens.

Command: ``python -m flexgen_helm.runs.cache_quality --tokens 512 2000 6000 --json result.json``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from flexgen_helm import Engine, Policy
from flexgen_helm.assets import smollm2_folder
from flexgen_helm.assets.sotu import recent_addresses
from flexgen_helm.fidelity.compare import compare_states, final_states
from flexgen_helm.fidelity.windows import Window
from flexgen_helm.runs.command_line import add_json, add_model, make_parser, prepare_libraries, reports_errors, write_json
from flexgen_helm.statistics.arrays import Floats
from flexgen_helm.statistics.bootstrap import Bootstrap, Estimate

VARIANTS = ("kv8", "kv4", "k4v2", "kv2", "s10", "s5", "kv4s10", "kv4-flexgen", "kv2-flexgen", "s10-flexgen", "kv4s10-flexgen")
BLOCK_TOKENS = 25
"""Consecutive tokens that a resample draws together; 512 tokens have 21 blocks, and fewer give intervals too narrow."""


@dataclass(frozen=True)
class Loss:
    """Figures of a variant on a text of a length."""

    variant: str
    tokens: int
    bits: float
    kl: float
    kl_interval: tuple[float, float] | None
    """95 %; None: the text is no longer than a block."""
    top1: float


@reports_errors
def main() -> int:
    """Measure and print a table."""
    parser = make_parser("cache_quality", __doc__)
    add_model(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000], metavar="N", help="lengths (%(default)s)")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="V", help="as behind the @ of a model")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch (%(default)s)")
    add_json(parser)
    options = parser.parse_args()
    prepare_libraries(options.threads)
    model = options.model or smollm2_folder()
    print("variant         tokens   bits  KL mean     95 % interval    top-1")
    losses: list[Loss] = []
    with Engine.from_pretrained(str(model), dtype="float32", policy=Policy()) as exact:
        windows = [window_of(exact, length) for length in options.tokens]
        expected = [final_states(exact, [window]) for window in windows]
        for variant in options.variants:
            for loss in measured(exact, model, variant, list(zip(windows, expected, strict=True))):
                print(described(loss), flush=True)
                losses.append(loss)
    write_json(options.json, [asdict(loss) for loss in losses])
    return 0


def window_of(engine: Engine, length: int) -> Window:
    """Return the end token and the beginning of the text, of so many tokens together."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode(recent_addresses(), add_special_tokens=False, verbose=False)[: length - 1]
    return Window((tokenizer.eos_token_id, *tokens), 1, 0)


def measured(exact: Engine, model: Path, variant: str, windows: Sequence[tuple[Window, Tensor]]) -> Iterator[Loss]:
    """Measure a variant on each window, of which the exact engine's final states are given."""
    with Engine.from_pretrained(str(model), dtype="float32", compression=variant, policy=Policy()) as engine:
        bits = engine.describe().bits_per_cache_element
        for window, expected in windows:
            found = compare_states(exact, engine, [expected, final_states(engine, [window])], [window])
            kl = mean_of_tokens(found.kl)
            yield Loss(variant, len(window.tokens), bits, kl.value, kl.interval, float(found.agrees.mean()))


def mean_of_tokens(values: Floats) -> Estimate:
    """Return the mean of consecutive tokens' values ``[T]``, with an interval over blocks of them."""
    return Bootstrap(np.arange(len(values)) // BLOCK_TOKENS).mean(values)


def described(loss: Loss) -> str:
    """Return the line of a loss."""
    interval = "-" if loss.kl_interval is None else "{:.5f} to {:.5f}".format(*loss.kl_interval)
    return f"{loss.variant:15} {loss.tokens:6} {loss.bits:6.2f} {loss.kl:8.5f} {interval:>19} {loss.top1:8.1%}"


if __name__ == "__main__":
    sys.exit(main())
