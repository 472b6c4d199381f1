"""Build one completion token by token: collect its tokens and text, and decide when it ends."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence

from flexgen_helm.generation.detokenizer import Detokenizer, token_texts
from flexgen_helm.generation.stop_strings import StopFinder
from flexgen_helm.generation.vocabulary import Vocabulary
from flexgen_helm.types import Completion, FinishReason, Job, TokenLogprob


class CompletionBuilder:
    """Collects the generated tokens of one sequence and decides when it ends.

    A completion ends at an end token, at a stop string in the decoded text, or after ``Job.max_new_tokens`` tokens. A stop
    string may span several tokens, begin inside of a token, or be the literal text of a special token.
    """

    def __init__(
        self,
        vocabulary: Vocabulary | None,
        prompt_ids: Sequence[int],
        *,
        job: Job,
        end_token_ids: Collection[int],
    ) -> None:
        """Start an empty completion.

        Args:
            vocabulary: The tokenizer's vocabulary. None means that the model has no tokenizer: texts are empty and stop strings
                impossible.
            prompt_ids: Token ids of the prompt.
            job: The job, of which ``stop`` and ``max_new_tokens`` are read.
            end_token_ids: Tokens that end a text.

        Raises:
            ValueError: If the job has stop strings and there is no vocabulary.
        """
        if vocabulary is None and job.stop:
            raise ValueError("stop strings need a tokenizer")
        self._vocabulary = vocabulary
        self._prompt_ids = prompt_ids
        self._stops = tuple(job.stop)
        self._max_new_tokens = job.max_new_tokens
        self._end_token_ids = end_token_ids
        self._detokenizer = Detokenizer(vocabulary, prompt_ids) if vocabulary else None
        self._finder = StopFinder(self._stops)
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[list[TokenLogprob]] = []
        self._text_starts: list[tuple[int, bool]] = []
        """Of each token; see `Detokenizer.start_of`."""
        self._stop_index: int | None = None
        self._finish_reason: FinishReason | None = None

    def __len__(self) -> int:
        """Return the number of tokens so far, end token included."""
        return len(self._token_ids)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Reason why the completion ended, or None while it grows."""
        return self._finish_reason

    def append(self, token_id: int, logprob: float, top: Sequence[TokenLogprob] = ()) -> FinishReason | None:
        """Add one generated token. Return the reason why the completion ends with it, or None if it continues.

        Args:
            token_id: The token.
            logprob: Its log-probability in nats under the model, before temperature and top_p.
            top: The most likely tokens at this step, best first.

        Raises:
            RuntimeError: If the completion has ended already.
        """
        if self._finish_reason is not None:
            raise RuntimeError(f"token {token_id} was added to a completion that had ended by {self._finish_reason}")
        self._token_ids.append(token_id)
        self._logprobs.append(logprob)
        self._top_logprobs.append(list(top))
        self._finish_reason = self._advance(token_id)
        return self._finish_reason

    def finish(self) -> Completion:
        """Return the completion. If it still grows, it ends as if it had reached ``max_new_tokens``."""
        if self._finish_reason is None:
            self._finish_reason = self._flush("length")
        kept = len(self._token_ids)
        # An end token or the special token of a stop string is not part of the text.
        num_text_tokens = kept - (self._finish_reason != "length")
        text = self._detokenizer.text if self._detokenizer else ""
        if self._stop_index is not None:
            kept = bisect_right(self._text_starts, (self._stop_index, False))
            num_text_tokens = bisect_left(self._text_starts, (self._stop_index, False))
            text = text[: self._stop_index]
        token_ids = self._token_ids[:kept]
        texts = token_texts(self._vocabulary, token_ids, self._prompt_ids) if self._vocabulary else [""] * kept
        return Completion(
            text=text,
            token_ids=token_ids,
            token_texts=texts,
            logprobs=self._logprobs[:kept],
            top_logprobs=self._top_logprobs[:kept],
            finish_reason=self._finish_reason,
            num_text_tokens=num_text_tokens,
        )

    def _advance(self, token_id: int) -> FinishReason | None:
        if self._detokenizer:
            self._text_starts.append(self._detokenizer.start_of(token_id))
        if token_id in self._end_token_ids:
            return self._flush("endoftext")
        if self._detokenizer:
            self._stop_index = self._finder.append(self._detokenizer.append(token_id))
            if self._stop_index is not None:
                return "stop"
        if self._is_stop_token(token_id):
            return self._flush("stop")
        return self._flush("length") if len(self._token_ids) >= self._max_new_tokens else None

    def _flush(self, reason: FinishReason) -> FinishReason:
        """Settle the text that waited for more bytes of a character. If that completes a stop string, the reason is "stop"."""
        if self._detokenizer:
            self._stop_index = self._finder.append(self._detokenizer.flush())
        return reason if self._stop_index is None else "stop"

    def _is_stop_token(self, token_id: int) -> bool:
        # Special tokens are not part of the text, so the finder never sees "<|im_end|>".
        if self._vocabulary is None or not self._stops or not self._vocabulary.is_special(token_id):
            return False
        literal = self._vocabulary.text(token_id)
        return any(stop in literal for stop in self._stops)
