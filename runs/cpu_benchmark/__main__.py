"""The engine against plain transformers on this CPU: SmolLM2-135M in float32, HELM's own prompts, one process.

a: 5-shot MMLU anatomy, 100 questions, against one forward per question.
b: 64 prompts of synthetic reasoning, 50 new tokens each (no end token), against ``generate`` per prompt.

Both sides use the same weights and threads and take turns, so that a machine that others use as well slows both.
Cost of one repetition on one core of a server CPU: a about 2 minutes, b about 6 minutes; 2 GiB of memory.

Command: ``python -m flexgen_helm.runs.cpu_benchmark --threads 1 --repeats 3 --json result.json``
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer

from flexgen_helm import Engine
from flexgen_helm.assets import smollm2_folder
from flexgen_helm.runs.command_line import add_json, make_parser, prepare_libraries, reports_errors, write_json
from flexgen_helm.runs.cpu_benchmark.contenders import (
    Peer,
    copy_without_end_tokens,
    engine_continuations,
    engine_next_tokens,
)
from flexgen_helm.runs.cpu_benchmark.prompts import helm_prompts

Answers = list[list[int]]
NUM_NEW_TOKENS = 50


@dataclass(frozen=True)
class Part:
    """One of the two comparisons."""

    title: str
    run_entry: str
    num_instances: int
    shares_all: bool
    """Whether prompts are all of the work, so that the token ratio is what can be reached."""


PARTS = {
    "a": Part("5-shot MMLU anatomy", "mmlu:subject=anatomy,method=multiple_choice_joint", 100, shares_all=True),
    "b": Part(f"{NUM_NEW_TOKENS} new tokens", "synthetic_reasoning:mode=pattern_match", 64, shares_all=False),
}


@dataclass
class Comparison:
    """Measurements of one part; times are in seconds, one entry for each repetition."""

    title: str
    shares_all: bool
    threads: int
    row_sizes: list[int]
    """Sequences in a decode row and tokens in a prefill row."""
    prompts: int
    tokens_asked: int
    tokens_computed: int = 0
    """Prompt tokens that the engine put through the layers."""
    engine_s: list[float] = field(default_factory=list)
    peer_s: list[float] = field(default_factory=list)
    answers_that_differ: int = 0
    tokens_that_differ: int = 0

    @property
    def time_ratio(self) -> float:
        """How many times faster the engine is, by the medians."""
        return statistics.median(self.peer_s) / statistics.median(self.engine_s)

    @property
    def token_ratio(self) -> float:
        """Prompt tokens asked over computed."""
        return self.tokens_asked / self.tokens_computed

    @property
    def share(self) -> float | None:
        """Time ratio over token ratio; None where other work than prompts counts."""
        return self.time_ratio / self.token_ratio if self.shares_all else None

    def as_dict(self) -> dict[str, object]:
        """Everything measured and derived."""
        derived = {"time_ratio": self.time_ratio, "token_ratio": self.token_ratio, "share": self.share}
        return {**dataclasses.asdict(self), **derived}

    def lines(self) -> list[str]:
        """Return the lines that a person reads."""
        ratios = [peer / engine for peer, engine in zip(self.peer_s, self.engine_s, strict=True)]
        share = "" if self.share is None else f", {self.share:.2f} of the token ratio"
        return [
            f"{self.title}: {self.prompts} prompts, {self.threads} threads, rows of {self.row_sizes}",
            f"  tokens          {self.tokens_asked} asked, {self.tokens_computed} computed, {self.token_ratio:.2f}:1",
            f"  seconds         engine {_join(self.engine_s)}; transformers one at a time {_join(self.peer_s)}",
            f"  time ratio      {self.time_ratio:.2f} (repetitions {_join(ratios, 2)}){share}",
            f"  answers differ  {self.answers_that_differ} of {self.prompts} ({self.tokens_that_differ} tokens)",
        ]


def compare(part: Part, engine: Engine, peer: Peer, prompts: Answers, *, repeats: int) -> Comparison:
    """Lets both sides answer the prompts in turns and compares times and answers."""
    ours: Callable[[Answers], Answers]
    theirs: Callable[[Answers], Answers]
    if part.shares_all:
        ours, theirs = partial(engine_next_tokens, engine), peer.next_tokens
    else:
        ours = partial(engine_continuations, engine, num_new_tokens=NUM_NEW_TOKENS)
        theirs = partial(peer.continuations, num_new_tokens=NUM_NEW_TOKENS)
    sizes = [engine.policy.gpu_batch_size, engine.policy.gpu_batch_tokens]
    measured = Comparison(part.title, part.shares_all, torch.get_num_threads(), sizes, len(prompts), sum(map(len, prompts)))
    ours(prompts[:2])
    theirs(prompts[:2])
    for _ in range(repeats):
        answers, seconds = timed(ours, prompts)
        measured.engine_s.append(seconds)
        measured.tokens_computed = engine.stats.prompt_tokens_computed
        expected, seconds = timed(theirs, prompts)
        measured.peer_s.append(seconds)
    pairs = list(zip(expected, answers, strict=True))
    measured.answers_that_differ = sum(a != b for a, b in pairs)
    measured.tokens_that_differ = sum(x != y for a, b in pairs for x, y in zip(a, b, strict=True))
    return measured


def timed(answer: Callable[[Answers], Answers], prompts: Answers) -> tuple[Answers, float]:
    """Returns the answers and the seconds that they took."""
    start = time.perf_counter()
    answers = answer(prompts)
    return answers, time.perf_counter() - start


def _join(values: list[float], digits: int = 1) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    parser = make_parser("cpu_benchmark", __doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of both sides")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side; the median counts")
    parser.add_argument("--part", choices=sorted(PARTS), help="only this part")
    add_json(parser)
    options = parser.parse_args()
    prepare_libraries(options.threads)
    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        endless = copy_without_end_tokens(folder, Path(scratch) / folder.name)
        peer = Peer.load(endless)
        with Engine.from_pretrained(str(endless), dtype="float32", device="cpu") as engine:
            for name in [options.part] if options.part else sorted(PARTS):
                texts = helm_prompts(PARTS[name].run_entry, folder, PARTS[name].num_instances)
                prompts = [tokenizer.encode(text) for text in texts]
                results[name] = compare(PARTS[name], engine, peer, prompts, repeats=options.repeats)
                print("\n".join(results[name].lines()), flush=True)
    write_json(options.json, {name: result.as_dict() for name, result in results.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
