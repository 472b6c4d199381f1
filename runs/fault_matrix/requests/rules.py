"""What docs/requests.md says of a request: answered, or refused with one of some words in the message.

Written from the page, not from the code that it judges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from flexgen_helm.runs.fault_matrix.tiny_model import CONTEXT, UNKNOWN

DECLARED: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "embedding": (bool,),
    "echo_prompt": (bool,),
    "messages": (list, type(None)),
    "temperature": (int, float),
    "top_p": (int, float),
    "num_completions": (int,),
    "top_k_per_token": (int,),
    "max_tokens": (int,),
    "stop_sequences": (list,),
    "random": (str, type(None)),
}
NUMBERS = ("temperature", "top_p", "num_completions", "top_k_per_token", "max_tokens")
MOST_COMPLETIONS, MODEL_TOKENS = 4096, 400


def reasons(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return words of which a refusal must have one; none if the request is to be answered.

    Args:
        fields: Of the request; those of HELM's defaults that matter are among them.
        tokenizer: The model's.
    """
    given: dict[str, Any] = {
        **{"embedding": False, "echo_prompt": False, "messages": None, "top_p": 1, "num_completions": 1, "top_k_per_token": 1},
        **{"stop_sequences": [], "random": None, "presence_penalty": 0, "frequency_penalty": 0},
        **fields,
    }
    wrong = [name for name in DECLARED if not _is_declared(name, given[name])]
    # What depends on the value of a field of another type is not asked.
    found = [*wrong, *_unsupported(given)]
    if not wrong:
        found += [*_out_of_range(given), *_texts(given, tokenizer)]
    return found


def _is_declared(name: str, value: Any) -> bool:
    too_large = isinstance(value, int) and abs(value) >= 2**63
    return isinstance(value, DECLARED[name]) and not (name in NUMBERS and isinstance(value, bool)) and not too_large


def _unsupported(given: dict[str, Any]) -> Iterator[str]:
    if given["embedding"]:
        yield "embedding"
    if given["messages"] is not None and given["prompt"]:
        yield "messages"
    if given["messages"] is not None and given["echo_prompt"]:
        yield "echo_prompt"
    if given.get("multimodal_prompt") or given.get("image_generation_parameters"):
        yield "multimodal"
    if given.get("response_format"):
        yield "response_format"
    if any(given[name] != 0 for name in ("presence_penalty", "frequency_penalty")):
        yield "penalty"


def _out_of_range(given: dict[str, Any]) -> Iterator[str]:
    if given["echo_prompt"] and given["max_tokens"] > 0:
        yield "echo_prompt"
    if not given["echo_prompt"] and given["max_tokens"] == 0:
        yield "max_tokens"
    if given["max_tokens"] < 0:
        yield "max_tokens"
    if not (0 <= given["temperature"] < math.inf):
        yield "temperature"
    if not (0 < given["top_p"] <= 1):
        yield "top_p"
    if not (1 <= given["num_completions"] <= MOST_COMPLETIONS):
        yield "num_completions"
    if given["max_tokens"] > 0 and not (0 <= given["top_k_per_token"] <= MODEL_TOKENS):
        yield "top_k_per_token"
    if not all(isinstance(stop, str) and stop for stop in given["stop_sequences"]):
        yield "stop"


def _texts(given: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    text = given["prompt"]
    if given["messages"] is not None:
        turns = given["messages"]
        if not turns:
            yield "messages are"
            return
        malformed = [word for number, turn in enumerate(turns) for word in _turn(number, turn)]
        if malformed:
            yield from malformed
            return
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        yield "surrogate"
        return
    if not text:
        yield "prompt is empty"
    if UNKNOWN in text:
        yield "tokenizer gave token id"
    if len(tokenizer(text, add_special_tokens=False).input_ids) + given["max_tokens"] > CONTEXT:
        yield "context holds"


def _turn(number: int, turn: Any) -> Iterator[str]:
    if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
        yield f"Message {number} is"
    elif turn["role"] not in ("system", "user", "assistant"):
        yield "has the role"
    elif not isinstance(turn["content"], str):
        yield "only text"
