"""The Hugging Face backend of EleutherAI's lm-eval, at its best batch size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

BATCH_SIZES = (1, 4, 16, 32)


class TokensOut(HFLM):
    """Gives new tokens as numbers in place of their text, and generates as many as asked."""

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Return the numbers of a list of tokens; a single one is the end token, whose text is asked for."""
        if isinstance(tokens, list):
            return " ".join(map(str, tokens))
        return str(super().tok_decode(tokens, skip_special_tokens=skip_special_tokens))

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        return super()._model_generate(context, max_length, [], **options)


def ways(task: dict[str, Any], stack: ExitStack) -> dict[str, Callable[[list[list[int]]], list[list[int]]]]:
    """Load the model; return a way for each batch size."""
    model = TokensOut(pretrained=task["folder"], dtype=task["dtype"], device="cpu", batch_size=1)
    texts = {tuple(prompt): text for prompt, text in zip(task["prompts"], task["texts"], strict=True)}
    settings = {"until": [], "max_gen_toks": task["new_tokens"], "do_sample": False}

    def way(size: int) -> Callable[[list[list[int]]], list[list[int]]]:
        def answer(prompts: list[list[int]]) -> list[list[int]]:
            model.batch_size_per_gpu = size
            asked = [(texts[tuple(prompt)], settings) for prompt in prompts]
            requests = [Instance("generate_until", doc={}, arguments=one, idx=i) for i, one in enumerate(asked)]
            return [list(map(int, answer.split())) for answer in model.generate_until(requests, disable_tqdm=True)]

        return answer

    return {f"batches of {size}": way(size) for size in BATCH_SIZES}
