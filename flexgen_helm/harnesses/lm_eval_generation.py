"""lm-eval's settings of generation as jobs, and completions as the texts that lm-eval's Hugging Face backend would return."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from transformers import PreTrainedTokenizerBase

from flexgen_helm.errors import InvalidJob
from flexgen_helm.types import Completion, Job

ONLY_SAMPLES = ("top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that change samples alone, so that they may stand beside greedy generation."""
NEUTRAL: Mapping[str, object] = {
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "early_stopping": False,
    "use_cache": True,
}
"""Values of other settings of `generate` that change nothing."""


class Generations:
    """Makes the jobs of one call. A request that comes several times gets another seed each time."""

    def __init__(self, eos: str | None, max_length: int, default_new_tokens: int) -> None:
        """Hold what all requests of the call share.

        Args:
            eos: Text of the end token, at which lm-eval stops too; None: there is none.
            max_length: Tokens of prompt and answer together.
            default_new_tokens: New tokens where a request names no number.
        """
        self._eos, self._max_length, self._default = eos, max_length, default_new_tokens
        self._seen: Counter[str] = Counter()

    def job(self, context: str, token_ids: Sequence[int], settings: Mapping[str, Any]) -> Job:
        """Return the job of a request. A context for which there is no room loses its first tokens, as in lm-eval.

        Raises:
            InvalidJob: If a setting cannot be honoured, or the answer alone fills the context.
        """
        options: dict[str, Any] = normalize_gen_kwargs(dict(settings), self._default)
        until = handle_stop_sequences(options.pop("until", None), eos=self._eos)
        new, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
        temperature, top_p = options.pop("temperature", 0.0), options.pop("top_p", None)
        seed = options.pop("seed", None) or 0
        _refuse_others(options, sampled)
        if new >= self._max_length:
            raise InvalidJob(
                f"max_gen_toks is {new}, but the context holds {self._max_length} tokens, prompt included. Lower max_gen_toks."
            )
        key = json.dumps([context, settings], sort_keys=True, default=repr)
        self._seen[key] += 1
        return Job(
            token_ids=token_ids[-(self._max_length - new) :],
            max_new_tokens=new,
            temperature=temperature if sampled else 0.0,
            top_p=1.0 if top_p is None or not sampled else top_p,
            seed=seed + self._seen[key] - 1,
            stop=tuple(text for text in until if text),
        )


def _refuse_others(options: Mapping[str, Any], sampled: bool) -> None:
    for name, value in options.items():
        changes_nothing = value is None or (name in NEUTRAL and value == NEUTRAL[name])
        if not changes_nothing and not (name in ONLY_SAMPLES and not sampled):
            raise InvalidJob(
                f"The generation setting `{name}` ({value!r}) is not supported: answers come from the unchanged model. "
                "Leave it out of the task or of --gen_kwargs, or use lm-eval's `hf` model. Served are until, max_gen_toks, "
                "do_sample, temperature, top_p and seed."
            )


def text_of(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a completion's text as its tokens read alone, where some tokenizers write no space before the first word."""
    alone = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert isinstance(alone, str)
    if completion.finish_reason != "stop":
        return alone
    return completion.text[completion.text.startswith(" ") and not alone.startswith(" ") :]
