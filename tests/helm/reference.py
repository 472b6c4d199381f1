"""The judge of HELM results: plain ``transformers``, one request at a time, as a HELM client."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from helm.benchmark.window_services.local_window_service import LocalWindowService
from helm.clients.client import Client
from helm.common.request import GeneratedOutput, Request, RequestResult, Token
from helm.common.tokenization_request import TokenizationToken
from tokenizers.decoders import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flexgen_helm.generation.sampling import UniformStream, choose
from tests.reference import TIE

BOUNDARY = 1e-4
"""A sampled token may differ where the draw is this close to a boundary of the cumulative distribution."""


@cache
def load(folder: str) -> tuple[Any, Any]:
    """Returns tokenizer and float32 model of a folder."""
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def context_of(folder: str) -> int:
    """Returns the context of a model in tokens."""
    config = load(folder)[1].config
    names = ("max_position_embeddings", "seq_length", "max_seq_len")
    return next((getattr(config, name) for name in names if hasattr(config, name)), 2048)


class ReferenceWindowService(LocalWindowService):
    """HELM's own, for which a prefix token and the text behind it are two things to decode.

    A SentencePiece tokenizer decodes them with a space between, which no document has.
    """

    def decode(self, tokens: list[TokenizationToken], normalized_text: str | None = None) -> str:
        prefix = self.encode(self.prefix_token).tokens if self.prefix_token else []
        behind = tokens[len(prefix) :] if tokens[: len(prefix)] == prefix else tokens
        text: str = super().decode(behind, normalized_text)
        return text if behind is tokens else self.prefix_token + text


class ReferenceClient(Client):
    """Answers of HELM's contract: tokens of the prompt, or of the continuation up to its end token or stop string.

    ``finish_reason["close"]`` lists the steps at which another token is as good an answer.
    """

    def __init__(self, folder: str) -> None:
        self._tokenizer, self._model = load(folder)
        self._context = context_of(folder)
        end = self._model.generation_config.eos_token_id
        own = self._tokenizer.eos_token_id  # HELM's own client cuts at its text what transformers generates.
        self._end_tokens = {*(end if isinstance(end, list) else [end]), *([] if own is None else [own])}

    @torch.inference_mode()
    def make_request(self, request: Request) -> RequestResult:
        prompt = self._tokenizer(request.prompt, add_special_tokens=False).input_ids
        input_ids = self._bos(request, prompt) + prompt
        if request.echo_prompt:
            assert (request.max_tokens, request.num_completions) == (0, 1)
            outputs = [self._score(request.prompt, prompt, input_ids)]
        else:
            outputs = [self._continue(input_ids, request, index) for index in range(request.num_completions)]
        return RequestResult(success=True, cached=False, completions=outputs, embedding=[], request_time=0.0)

    def _bos(self, request: Request, prompt: list[int]) -> list[int]:
        """What the tokenizer itself puts before a text, unless it is there already or there is no room."""
        complete = self._tokenizer(request.prompt).input_ids
        added = complete[: len(complete) - len(prompt)]
        assert complete == added + prompt
        room = self._context - len(prompt) - request.max_tokens
        return added if room >= len(added) and prompt[: len(added)] != added else []

    def _score(self, text: str, prompt: list[int], input_ids: list[int]) -> GeneratedOutput:
        rows = self._model(torch.tensor([input_ids])).logits[0, :-1].log_softmax(-1)
        logprobs = [0.0, *rows.gather(1, torch.tensor(input_ids)[1:, None])[:, 0].tolist()]
        return _output(text, self._token_texts(prompt, text), logprobs[-len(prompt) :], {"reason": "length"})

    def _continue(self, input_ids: list[int], request: Request, index: int) -> GeneratedOutput:
        sampled = request.temperature > 0
        new, logits = self._sample(input_ids, request, index) if sampled else self._greedy(input_ids, request.max_tokens)
        logprobs = [float(row.log_softmax(-1)[token]) for row, token in zip(logits, new, strict=True)]
        close = [step for step, row in enumerate(logits) if self._is_close(row, input_ids, request, index, step)]
        num_kept, text, reason = self._end(input_ids, new, request)
        whole = self._text(input_ids, new[:num_kept], skip_special=False)
        texts = self._token_texts(new[:num_kept], whole)
        return _output(text, texts, logprobs[:num_kept], {"reason": reason, "close": close})

    def _greedy(self, input_ids: list[int], max_tokens: int) -> tuple[list[int], list[torch.Tensor]]:
        prompt = torch.tensor([input_ids])
        output = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=sorted(self._end_tokens),
            output_logits=True,
            return_dict_in_generate=True,
        )
        return output.sequences[0, len(input_ids) :].tolist(), [step[0] for step in output.logits]

    def _sample(self, input_ids: list[int], request: Request, index: int) -> tuple[list[int], list[torch.Tensor]]:
        """Whole forwards, one for each token, and our sampler."""
        assert (request.top_p, request.random) == (1, None)
        stream, new, rows = UniformStream(input_ids, None, index), list[int](), list[torch.Tensor]()
        while len(new) < request.max_tokens and self._end(input_ids, new, request)[2] == "length":
            rows.append(self._model(torch.tensor([[*input_ids, *new]]), use_cache=False).logits[0, -1])
            u = stream.at(len(new))
            new.append(choose(rows[-1], temperature=request.temperature, top_p=request.top_p, u=u))
        return new, rows

    def _is_close(self, row: torch.Tensor, input_ids: list[int], request: Request, index: int, step: int) -> bool:
        if request.temperature == 0:
            best, second = row.log_softmax(-1).topk(2).values.tolist()
            return bool(best - second < TIE)
        cumulative = (row.double() / request.temperature).softmax(-1).cumsum(-1)
        return float((cumulative - UniformStream(input_ids, None, index).at(step)).abs().min()) < BOUNDARY

    def _end(self, input_ids: list[int], new: list[int], request: Request) -> tuple[int, str, str]:
        """Number of tokens that count, text, finish reason: text ends before a stop string, tokens before what only it has."""
        for number, token in enumerate(new):
            if token in self._end_tokens:
                return number, self._text(input_ids, new[:number]), "endoftext"
            text = self._text(input_ids, new[: number + 1])
            found = [text.index(stop) for stop in request.stop_sequences if stop in text]
            if found:
                ends = [len(self._text(input_ids, new[:end])) for end in range(number + 2)]
                holder = next(position for position in range(number + 1) if ends[position + 1] > min(found))
                return holder + (ends[holder] < min(found)), text[: min(found)], "stop"
        return len(new), self._text(input_ids, new), "length"

    def _text(self, input_ids: list[int], new: list[int], *, skip_special: bool = True) -> str:
        """How tokens read behind others."""
        special = self._tokenizer.all_special_ids if skip_special else []
        kept = [token for token in new if token not in special]
        text: str = self._tokenizer.decode(input_ids + kept)
        return text[len(self._tokenizer.decode(input_ids)) :]

    def _token_texts(self, ids: list[int], whole: str) -> list[str]:
        """Texts whose concatenation is ``whole``; what is no text by itself is written as bytes in HELM's notation."""
        pieces = [self._piece(token) for token in ids]
        first = next((place for place, token in enumerate(ids) if token not in self._tokenizer.all_special_ids), None)
        if first is not None and b"".join(pieces).decode(errors="replace") != whole:
            # SentencePiece begins a text with a space that it does not show.
            shown = [*pieces[:first], pieces[first].removeprefix(b" "), *pieces[first + 1 :]]
            pieces = shown if b"".join(shown).decode(errors="replace") == whole else pieces
        return [_helm_text(piece) for piece in pieces]

    def _piece(self, token: int) -> bytes:
        name: str = self._tokenizer.convert_ids_to_tokens(token)
        if token in self._tokenizer.all_special_ids:
            return name.encode()
        if isinstance(self._tokenizer.backend_tokenizer.decoder, ByteLevel):
            return bytes({character: byte for byte, character in bytes_to_unicode().items()}[c] for c in name)
        is_byte = len(name) == len("<0x00>") and name.startswith("<0x")
        return bytes.fromhex(name[3:5]) if is_byte else name.replace("▁", " ").encode()


def _output(text: str, texts: list[str], logprobs: list[float], finish_reason: dict[str, Any]) -> GeneratedOutput:
    tokens = [Token(*pair) for pair in zip(texts, logprobs, strict=True)]
    return GeneratedOutput(text, sum(logprobs), tokens, finish_reason=finish_reason)


def _helm_text(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
