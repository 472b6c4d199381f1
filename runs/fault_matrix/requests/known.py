"""What plain transformers answers, one request at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from helm.common.request import GeneratedOutput
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

TOKEN_TOLERANCE, PROMPT_TOLERANCE = 1e-4, 3e-4
"""Largest differences of log-probabilities in float32 (exactness level C, docs/architecture.md)."""
TIE = 2e-4
"""Where the two best tokens are as close as this, either is right."""


@dataclass(frozen=True)
class Greedy:
    """The most likely continuation of a prompt."""

    token_ids: list[int]
    logprobs: list[float]
    tied: int
    """Tokens before the first that may as well be another one."""


class Known:
    """A model as transformers runs it."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self._ends = {self._model.generation_config.eos_token_id}

    def tokens(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text, without special tokens."""
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def conversation(self, messages: list[dict[str, str]]) -> str:
        """Return messages as the model's chat template writes them."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    @lru_cache(maxsize=4096)  # noqa: B019 - lives as long as the process
    @torch.inference_mode()
    def greedy(self, ids: tuple[int, ...], count: int) -> Greedy:
        """Return the most likely continuation of so many tokens, or up to an end token, which is not part of it."""
        given = torch.tensor([ids])
        found = self._model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        chosen = found.sequences[0, len(ids) :].tolist()
        rows = torch.log_softmax(torch.cat(found.logits).float(), dim=-1)
        best = rows.topk(2, dim=-1).values
        close = [step for step, pair in enumerate(best.tolist()) if pair[0] - pair[1] < TIE]
        logprobs = [float(rows[step, token]) for step, token in enumerate(chosen)]
        return Greedy(chosen, logprobs, close[0] if close else len(chosen))

    @lru_cache(maxsize=1024)  # noqa: B019
    @torch.inference_mode()
    def scores(self, ids: tuple[int, ...]) -> list[float]:
        """Return the log-probability of each token given those before it; 0.0 for the first."""
        rows = torch.log_softmax(self._model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
        return [0.0, *(float(rows[position, token]) for position, token in enumerate(ids[1:]))]

    def fault_of_scores(self, output: GeneratedOutput, prompt: str) -> str:
        """Return in words how the scores of a prompt differ from the right ones; empty if they do not."""
        expected = self.scores(self.tokens(prompt))
        given = [token.logprob for token in output.tokens]
        if output.text != prompt or len(given) != len(expected):
            return f"the echo of {prompt[:40]!r} is {output.text[:40]!r} in {len(given)} tokens, not {len(expected)}"
        return _difference(given, expected, PROMPT_TOLERANCE)

    def fault_of_completion(self, output: GeneratedOutput, text: str, asked: dict[str, Any]) -> str:
        """Return in words how a greedy completion differs from the right one; empty if it does not."""
        count, stops = asked["max_tokens"], asked.get("stop_sequences", [])
        greedy = self.greedy(self.tokens(text), count)
        chosen = greedy.token_ids
        if greedy.tied < len(chosen):
            return ""  # another token would be as right, and everything behind it
        ended = bool(chosen) and chosen[-1] in self._ends
        expected, shown = self._cut(chosen[:-1] if ended else chosen, stops)
        if output.text != expected:
            return f"the answer to {text[:40]!r} is {output.text[:60]!r}, not {expected[:60]!r}"
        if len(output.tokens) != shown:
            return f"the answer to {text[:40]!r} has {len(output.tokens)} tokens, not {shown}"
        return _difference([token.logprob for token in output.tokens], greedy.logprobs[:shown], TOKEN_TOLERANCE)

    def _cut(self, ids: list[int], stops: Iterable[str]) -> tuple[str, int]:
        """Return the text up to the first stop string that appears while tokens come, and the tokens that begin before it."""
        texts = ["", *self._texts(ids)]
        for text in texts:
            places = [text.find(stop) for stop in stops if stop in text]
            if places:
                at = min(places)
                return text[:at], sum(len(before) < at for before in texts[: texts.index(text)])
        return texts[-1], len(ids)

    def _texts(self, ids: list[int]) -> Iterator[str]:
        return (str(self.tokenizer.decode(ids[: count + 1], skip_special_tokens=True)) for count in range(len(ids)))


def _difference(given: list[float], expected: list[float], tolerance: float) -> str:
    worst = max((abs(one - other) for one, other in zip(given, expected, strict=True)), default=0.0)
    return "" if worst <= tolerance and not math.isnan(worst) else f"log-probabilities differ by {worst:.2g}"
