"""The judge: plain ``transformers``, one request at a time, and the tolerances under which an engine agrees with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flexgen_helm.types import Completion, Job, Result, TokenLogprob

TOKEN_TOLERANCE = 1e-4
"""Largest difference of a generated token's or a candidate's log-probability in float32 (exactness level C)."""
PROMPT_TOLERANCE = 3e-4
"""Largest difference of a prompt token's log-probability in float32 (exactness level C)."""
TIE = 2e-4
"""A first greedy token that differs is a tie when the reference's two best are closer than this, in nats."""


@dataclass(frozen=True)
class Greedy:
    """What ``generate`` answered. V: vocabulary; n: generated tokens."""

    token_ids: list[int]
    log_probs: torch.Tensor
    """``[n, V]`` log-probabilities of the unwarped model at each step."""

    @property
    def logprobs(self) -> list[float]:
        """Log-probability of each generated token."""
        return [float(self.log_probs[step, token]) for step, token in enumerate(self.token_ids)]

    def top(self, count: int) -> list[list[TokenLogprob]]:
        """Returns the ``count`` most likely tokens at each step, best first."""
        values, tokens = self.log_probs.topk(count, dim=-1)
        pairs = zip(tokens.tolist(), values.tolist(), strict=True)
        return [[TokenLogprob(*pair) for pair in zip(*row, strict=True)] for row in pairs]

    @property
    def margins(self) -> list[float]:
        """Distance in nats between the two most likely tokens at each step."""
        best = self.log_probs.topk(2, dim=-1).values
        return (best[:, 0] - best[:, 1]).tolist() if len(best) else []


class Reference:
    """A model as ``transformers`` runs it, without any batching."""

    def __init__(self, folder: str | Path, *, attn_implementation: str = "eager", dtype: str = "float32") -> None:
        """Loads the model on the CPU.

        Args:
            folder: A model folder.
            attn_implementation: ``"eager"`` is right for every family; others ignore softcaps and sinks.
            dtype: Name of a torch dtype.
        """
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attn_implementation
        ).eval()

    @property
    def end_tokens(self) -> set[int]:
        """End tokens of the generation config."""
        end = self.model.generation_config.eos_token_id
        return set(end) if isinstance(end, list) else {end}

    @torch.inference_mode()
    def log_probs(self, ids: Sequence[int]) -> torch.Tensor:
        """Returns the log-probabilities ``[tokens, V]`` of what follows each token, in float32."""
        logits = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)

    def score(self, ids: Sequence[int]) -> list[float]:
        """Returns the log-probability of each token given those before it; 0.0 for the first."""
        rows = self.log_probs(ids)
        return [0.0] + [float(rows[position, token]) for position, token in enumerate(ids[1:])]

    @torch.inference_mode()
    def greedy(self, ids: Sequence[int], max_new_tokens: int, *, eos: int | None = None) -> Greedy:
        """Continues ``ids`` with the most likely tokens, up to and including an end token.

        Args:
            ids: Prompt tokens, BOS included if there is one.
            max_new_tokens: Number of tokens at most.
            eos: End token in place of those of the generation config.

        Returns:
            The tokens with the log-probabilities of the raw logits, before any warping.
        """
        vocab = self.model.get_output_embeddings().weight.shape[0]
        if max_new_tokens == 0:
            return Greedy([], torch.empty(0, vocab))
        config = self.model.generation_config
        prompt = torch.tensor([list(ids)])
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=config.eos_token_id if eos is None else eos,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(list(output.logits)).float()
        return Greedy(output.sequences[0, len(ids) :].tolist(), torch.log_softmax(logits, dim=-1))


@dataclass
class Agreement:
    """How far results were from the reference; differences are in nats."""

    tokens: int = 0
    """Generated tokens compared."""
    ties: int = 0
    """Completions that parted from the reference at a tie, and were compared up to there."""
    worst_token: float = 0.0
    worst_prompt: float = 0.0
    failures: list[str] = field(default_factory=list)
    """One line for each difference beyond the tolerance."""

    def __str__(self) -> str:
        """One line for a report."""
        return (
            f"{self.tokens} tokens compared, {self.ties} ties, worst difference {self.worst_token:.1e} (generated), "
            f"{self.worst_prompt:.1e} (prompt); {len(self.failures)} beyond tolerance"
        )

    def add(self, job: Job, result: Result, reference: Reference) -> None:
        """Compares one greedy job, given by token ids, with the reference at level C."""
        if job.token_ids is None:
            raise ValueError("the reference compares jobs given by token_ids")
        if result.error is not None:
            self.failures.append(f"prompt of {len(job.token_ids)}: {result.error!r}")
            return
        if job.score_prompt:
            self._prompt(reference.score(job.token_ids), result.prompt_logprobs)
        expected = reference.greedy(job.token_ids, job.max_new_tokens)
        if job.max_new_tokens and len(result.completions) != job.num_completions:
            self.failures.append(f"{len(result.completions)} completions in place of {job.num_completions}")
        for completion in result.completions:
            self._completion(expected, completion, job.top_logprobs)
            self._finish(expected, completion, reference.end_tokens)

    def _finish(self, expected: Greedy, got: Completion, end_tokens: set[int]) -> None:
        if got.token_ids and got.token_ids == expected.token_ids:
            reason = "endoftext" if got.token_ids[-1] in end_tokens else "length"
            if got.finish_reason != reason:
                self.failures.append(f"finish reason {got.finish_reason!r} in place of {reason!r}")

    def _prompt(self, expected: list[float], got: list[float] | None) -> None:
        if got is None or len(got) != len(expected) or got[0] != 0.0:
            self.failures.append(f"prompt log-probabilities {got} in place of {expected}")
            return
        worst = largest(a - b for a, b in zip(expected, got, strict=True))
        self.worst_prompt = max(self.worst_prompt, worst)
        if not worst <= PROMPT_TOLERANCE:
            self.failures.append(f"prompt of {len(expected)}: log-probabilities differ by {worst:.1e}")

    def _completion(self, expected: Greedy, got: Completion, num_top: int) -> None:
        for step in range(self._common_length(expected, got)):
            row = expected.log_probs[step]
            candidates = got.top_logprobs[step]
            if len(candidates) != num_top:
                self.failures.append(f"step {step}: {len(candidates)} candidates in place of {num_top}")
                continue
            best = row.topk(num_top).values.tolist() if num_top else []
            # By rank, for near ties may swap; and by token, so that a value cannot belong to another one.
            differences = [a - b.logprob for a, b in zip(best, candidates, strict=True)]
            differences += [float(row[token]) - logprob for token, logprob in candidates]
            worst = largest([*differences, float(row[got.token_ids[step]]) - got.logprobs[step]])
            self.tokens += 1
            self.worst_token = max(self.worst_token, worst)
            if not worst <= TOKEN_TOLERANCE:
                self.failures.append(f"step {step}: log-probabilities differ by {worst:.1e}")

    def _common_length(self, expected: Greedy, got: Completion) -> int:
        """Number of steps to compare: all of them, or those before a tie."""
        lengths = {len(got.token_ids), len(got.logprobs), len(got.top_logprobs)}
        if len(lengths) != 1:
            self.failures.append(f"lists of a completion have the lengths {sorted(lengths)}")
            return 0
        for step, (a, b) in enumerate(zip(expected.token_ids, got.token_ids, strict=False)):
            if a != b:
                if expected.margins[step] < TIE:
                    self.ties += 1
                else:
                    self.failures.append(f"step {step}: token {b} in place of {a}, margin {expected.margins[step]:.1e}")
                return step
        if len(expected.token_ids) != len(got.token_ids):
            self.failures.append(f"{len(got.token_ids)} tokens in place of {len(expected.token_ids)}")
        return min(len(expected.token_ids), len(got.token_ids))


def largest(differences: Iterable[float]) -> float:
    """Returns the largest magnitude; infinity if any is not a number."""
    return max((math.inf if math.isnan(d) else abs(d) for d in differences), default=0.0)
