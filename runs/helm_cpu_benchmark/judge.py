"""Judges which of two answers is right: plain ``transformers``, one request at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from flexgen_helm.runs.cpu_benchmark.contenders import Peer
from flexgen_helm.runs.helm_cpu_benchmark.answers import Answer, Asked

TOLERANCE = 3e-4
"""Largest difference of a log-probability in nats that rounding may cause in float32."""
TIE = 2e-4
"""Two best tokens that are closer than this, in nats, may swap by rounding."""

Verdict = Literal["both", "engine", "HELM's client", "neither", "tie"]
ENGINE: Verdict = "engine"
CLIENT: Verdict = "HELM's client"


@dataclass(frozen=True)
class Truth:
    """The model's own answer."""

    text: str
    logprobs: tuple[float, ...]
    """Log-probabilities of the prompt if it is scored (0.0 for the first token), otherwise of the tokens of ``text``."""
    smallest_margin: float
    """Between the best two tokens of any step, in nats; infinite where nothing is generated."""

    def answered(self, asked: Asked, answer: Answer) -> bool:
        """Whether an answer is the model's: its text, or the log-probabilities where these were asked for."""
        if asked.scores_prompt:
            return same_logprobs(answer.logprobs, self.logprobs)
        text: str = answer.text
        return text.strip() == self.text.strip()

    def scored(self, answer: Answer) -> bool:
        """Whether the log-probabilities of an answer are the model's; end token and stop string are not in all answers."""
        if self.text and not answer.logprobs:
            return False
        return same_logprobs(answer.logprobs, self.logprobs[: len(answer.logprobs)])

    def verdict(self, asked: Asked, theirs: Answer, ours: Answer) -> Verdict:
        """Say whose answer is the model's."""
        right = (self.answered(asked, ours), self.answered(asked, theirs))
        if not all(right) and self.smallest_margin < TIE:
            return "tie"
        verdicts: dict[tuple[bool, bool], Verdict] = {
            (True, True): "both",
            (True, False): ENGINE,
            (False, True): CLIENT,
            (False, False): "neither",
        }
        return verdicts[right]


class Judge:
    """A model as ``transformers`` runs it."""

    def __init__(self, model_folder: Path) -> None:
        """Load it in float32."""
        self._peer = Peer.load(model_folder)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)

    @torch.inference_mode()
    def truth(self, asked: Asked) -> Truth:
        """Answer one request: one forward for a scored prompt, one ``generate`` for the others."""
        model: Any = self._peer.model
        ids = self._tokenizer(asked.prompt, add_special_tokens=False, return_tensors="pt").input_ids
        if asked.scores_prompt:
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
            picked = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
            return Truth(asked.prompt, (0.0, *picked), float("inf"))
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked.max_tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **({"stop_strings": list(asked.stop), "tokenizer": self._tokenizer} if asked.stop else {}),
        )
        new = output.sequences[0, ids.shape[1] :]
        logprobs = torch.log_softmax(torch.cat(list(output.logits)).float(), dim=-1)
        best = logprobs.topk(2, dim=-1).values
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        for stop in asked.stop:
            text = text.split(stop)[0]
        picked = logprobs.gather(1, new[:, None])[:, 0].tolist()
        return Truth(text, tuple(picked), float((best[:, 0] - best[:, 1]).min()))


def same_logprobs(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two lists are as long and differ by rounding at most."""
    return len(a) == len(b) and all(abs(x - y) <= TOLERANCE for x, y in zip(a, b, strict=True))
