"""The judge of HELM results: plain ``transformers``, one request at a time, as a HELM client."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from helm.clients.client import Client
from helm.common.request import GeneratedOutput, Request, RequestResult, Token
from transformers import AutoModelForCausalLM, AutoTokenizer


@cache
def load(folder: str) -> tuple[Any, Any]:
    """Returns tokenizer and float32 model of a folder."""
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class ReferenceClient(Client):
    """Greedy answers and scores of prompts, for models whose tokenizer adds no special token.

    A completion ends before the first of the stop strings, and its tokens before the one that begins with it.
    """

    def __init__(self, folder: str) -> None:
        self._tokenizer, self._model = load(folder)

    @torch.inference_mode()
    def make_request(self, request: Request) -> RequestResult:
        assert (request.temperature, request.num_completions) == (0, 1)
        ids = self._tokenizer(request.prompt, return_tensors="pt").input_ids
        output = self._score(ids) if request.echo_prompt else self._generate(ids, request)
        return RequestResult(success=True, cached=False, completions=[output], embedding=[], request_time=0.0)

    def _score(self, ids: torch.Tensor) -> GeneratedOutput:
        logprobs = self._model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
        return self._output(ids[0].tolist(), [0.0, *logprobs], self._tokenizer.decode(ids[0]), "length")

    def _generate(self, ids: torch.Tensor, request: Request) -> GeneratedOutput:
        generated = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=request.max_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = generated.sequences[0, ids.shape[1] :].tolist()
        logprobs = [step[0].log_softmax(-1)[token].item() for step, token in zip(generated.logits, new, strict=True)]
        reason, end = "length", self._model.generation_config.eos_token_id
        if new[-1] in (end if isinstance(end, list) else [end]):
            new, reason = new[:-1], "endoftext"
        for end in range(1, len(new) + 1):
            text = self._tokenizer.decode(new[:end])
            for stop in request.stop_sequences:
                if stop in text:
                    kept = end - self._tokenizer.decode(new[end - 1]).startswith(stop)
                    return self._output(new[:kept], logprobs[:kept], text[: text.index(stop)], "stop")
        return self._output(new, logprobs[: len(new)], self._tokenizer.decode(new), reason)

    def _output(self, ids: list[int], logprobs: list[float], text: str, reason: str) -> GeneratedOutput:
        tokens = [Token(self._tokenizer.decode(token), value) for token, value in zip(ids, logprobs, strict=True)]
        return GeneratedOutput(text, sum(logprobs), tokens, finish_reason={"reason": reason})
