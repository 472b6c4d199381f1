"""The model `flexgen` of lm-eval: all requests of a call are one workload of the engine.

Importing this file registers it. Texts become tokens exactly as in lm-eval's Hugging Face backend, so that scores are the same.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from flexgen_helm.errors import FlexGenError, InvalidJob
from flexgen_helm.harnesses.late_engine import LateEngine
from flexgen_helm.harnesses.lm_eval_generation import Generations, text_of
from flexgen_helm.types import Job, Result

logger = logging.getLogger(__name__)

Answer = tuple[float, bool]
"""Log-probability of a continuation, and whether each of its tokens was the most likely one."""
Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts of a request, by which it is cached (None: it is a part of one), and tokens of context and continuation."""
COMMANDS_DEVICE = "cuda:0"
"""What lm-eval's command passes without ``--device``, on every machine; its own backend then takes the CPU too."""
NEW_TOKENS = 256
"""New tokens where a task names no number, as in lm-eval's Hugging Face backend."""


@register_model("flexgen")
class FlexGenLM(TemplateLM):
    """A model of lm-eval that the engine computes."""

    def __init__(  # noqa: PLR0913 - options of users, by keyword
        self,
        pretrained: str,
        *,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        """Open a model; its weights are read when the first requests come.

        Args:
            pretrained: A model folder or a name on the hub, with `@w4` and the like for a compressed variant.
            max_length: Context in tokens; None: the model's own.
            add_bos_token: Whether texts get the tokenizer's special tokens; None: as the tokenizer does by itself.
            prefix_token_id: Token before a text without context; None: BOS, or the end token where there is no BOS.
            chat_template_args: Values for the chat template.
            batch_size: Not used; the engine chooses its rows and blocks (``policy``).
            max_batch_size: Not used either.
            options: Options of `Engine.from_pretrained`.

        Raises:
            FlexGenError: If there is no such option or model, or the model is refused, or has no tokenizer.
        """
        super().__init__()
        if batch_size not in (None, 1, "1", "auto") or max_batch_size is not None:
            logger.warning("the engine chooses its own batches: batch_size has no effect; see the option policy")
        if options.get("device") == COMMANDS_DEVICE and not torch.cuda.is_available():
            options["device"] = "auto"
        self.late = LateEngine(pretrained, **options)
        self.tokenizer: PreTrainedTokenizerBase = self.late.tokenizer
        self._max_length, self._add_bos, self._prefix = max_length, add_bos_token, prefix_token_id
        self._template_values = chat_template_args or {}

    @property
    def max_length(self) -> int:
        """Most tokens of a generating request, prompt and answer together."""
        return min(self._max_length or self.late.max_length, self.late.max_length)

    @property
    def _most_scored(self) -> int:
        """Most tokens of context and continuation together. The Hugging Face backend does not compute the last one."""
        return min(self.max_length + 1, self.late.max_length)

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task names no number."""
        return NEW_TOKENS

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without context."""
        found = (self._prefix, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        known = next((token_id for token_id in found if token_id is not None), None)
        if known is None:
            raise InvalidJob("This tokenizer has no BOS and no end token to put before a text. Name one: prefix_token_id=...")
        return int(known)

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval keeps prompts that a chat template wrote."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text. One that begins with the prefix token's text gets no special tokens."""
        special = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = False
        chosen = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(string, **chosen, verbose=False))

    def _loglikelihood_tokens(self, requests: list[Pair], disable_tqdm: bool = False, **_: Any) -> list[Answer]:
        return self._score(requests, quiet=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text. Longer ones than the context are cut into windows, as in lm-eval."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for i, (text,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self._most_scored - 1, 1)
            found: list[Pair] = [(None, *make_disjoint_window(window)) for window in windows]
            pairs += found
            owners += [i] * len(found)
        left = Counter(owners)

        def count(index: int, answers: Sequence[Answer]) -> None:
            i = owners[index]
            left[i] -= 1
            if not left[i]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, total(i, answers))

        def total(i: int, answers: Sequence[Answer]) -> float:
            first = bisect_left(owners, i)
            return sum((logprob for logprob, _ in answers[first : bisect_right(owners, i)]), 0.0)

        answers = self._score(pairs, count, quiet=disable_tqdm)
        return [total(i, answers) for i in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a text for each request, cut before the first of its stop strings."""
        eos = None if self.tokenizer.eos_token_id is None else str(self.tokenizer.decode(self.tokenizer.eos_token_id))
        generations = Generations(eos, self.max_length, self.max_gen_toks)
        jobs = [
            generations.job(context, self._prompt(context) or [self.prefix_token_id], settings)
            for context, settings in (request.args for request in requests)
        ]
        texts = [""] * len(jobs)

        def keep(index: int, result: Result) -> None:
            texts[index] = text_of(result.completions[0], self.tokenizer)
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])

        self._run(jobs, keep, quiet=disable_tqdm)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation in the model's chat format. Without its system turns if the template refuses those."""
        if not self.tokenizer.chat_template:
            raise FlexGenError("This model's tokenizer has no chat template. Leave out --apply_chat_template.")

        def written(turns: list[dict[str, str]]) -> str:
            ending = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
            options: dict[str, Any] = {**ending, **self._template_values}
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **options))

        try:
            return written(chat_history)
        except TemplateError as error:
            logger.warning("the chat template refuses a conversation (%s); its system turns are left out", error)
            return written([turn for turn in chat_history if turn["role"] != "system"])

    def get_model_info(self) -> dict[str, Any]:
        """Return what decided the answers' bits, for the file of results; nothing if all answers were in the cache."""
        engine = self.late.loaded
        return {} if engine is None else {"flexgen_helm_numerics": asdict(engine.numerics)}

    def _prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt that is continued. A text that begins with BOS gets no special tokens."""
        special = False if has_bos_prefix(text, self.tokenizer.bos_token) else self._add_bos
        chosen = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(text, **chosen, verbose=False))

    def _score(
        self, pairs: Sequence[Pair], on_answer: Callable[[int, Sequence[Answer]], None] | None = None, *, quiet: bool
    ) -> list[Answer]:
        """Return the answer of each pair; what is too long loses the first tokens of its context.

        Args:
            pairs: The pairs.
            on_answer: Called with (index, answers) as soon as the answer with this index is there.
            quiet: Whether to show no progress.

        Raises:
            InvalidJob: If a continuation is empty, or longer than the context.
        """
        for _, _, continuation in pairs:
            if not 0 < len(continuation) < self._most_scored:
                raise InvalidJob(
                    f"A continuation has {len(continuation)} tokens, but must have 1 to {self._most_scored - 1}, for the "
                    f"context holds {self._most_scored}. Correct the task, or raise max_length."
                )
        cut = sum(len(context) + len(continuation) > self._most_scored for _, context, continuation in pairs)
        if cut:
            logger.warning("%d requests are longer than %d tokens and lose their first ones", cut, self._most_scored)
        answers: list[Answer] = [(0.0, False)] * len(pairs)

        def keep(index: int, result: Result) -> None:
            texts, _, continuation = pairs[index]
            assert result.prompt_logprobs is not None
            assert result.prompt_is_best is not None
            own = slice(-len(continuation), None)
            answers[index] = sum(result.prompt_logprobs[own]), all(result.prompt_is_best[own])
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[index])
            if on_answer is not None:
                on_answer(index, answers)

        tokens = [(context + continuation)[-self._most_scored :] for _, context, continuation in pairs]
        self._run([Job(token_ids=ids, score_prompt=True) for ids in tokens], keep, quiet=quiet)
        return answers

    def _run(self, jobs: list[Job], keep: Callable[[int, Result], None], *, quiet: bool) -> None:
        """Answer jobs as one workload.

        Raises:
            FlexGenError: If some were refused, once all others are answered.
        """
        if not jobs:
            return

        def on_result(index: int, result: Result) -> None:
            if result.error is None:
                keep(index, result)

        results = self.late.get(jobs).run(jobs, on_result, on_error="return", progress=False if quiet else None)
        errors = [result.error for result in results if result.error is not None]
        if errors:
            raise FlexGenError(f"{len(errors)} of {len(jobs)} requests have no answer. The first: {errors[0]}")
