"""Requests that no one should send, mixed with ordinary ones, from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helm.common.image_generation_parameters import ImageGenerationParameters
from helm.common.media_object import MediaObject, MultimediaObject
from helm.common.request import Request
from helm.common.response_format import ResponseFormat

from flexgen_helm.runs.fault_matrix.tiny_model import CONTEXT, UNKNOWN

Fields = dict[str, Any]
Fault = Callable[[random.Random], Fields]

PROMPTS = (
    "The quick brown fox",
    "Question: What is the capital of France?\nAnswer:",
    "naïve café, Größe",
    "中文 日本語 😀",
    " ",
    "\n\n\n",
    "\t\u3000\u00a0",
    "a\0b",
    "\x1b[31mred\x1b[0m",
    "\ufeff\uffff\ufffd",
    "שלום עולם",
    "مرحبا \u202eabc",
    "👩\u200d👧",
    "\ufe0fe\u0301\u0301",
    "<s>Hi",
    "</s>",
    "a</s>b",
    "{prompt} %s {0} \\n",
    "'; DROP TABLE answers; --",
    "../../etc/passwd",
    "Donaudampfschifffahrt" * 20,
    "x" * 700,
    "0 1 2 3 4 5 6 7 8 9 " * 15,
    *(f"{number} foxes and {number * 7} dogs" for number in range(20)),
)
"""Ordinary and strange prompts whose right answers are known."""
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Größe?\n"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": ""}],
)
IMAGE = MultimediaObject([MediaObject(text="Hi", content_type="text/plain")])
OTHER_TYPES: tuple[Any, ...] = (None, "5", b"5", 2.5, [], {}, (), object, 1j, True, math.nan, 3)
"""Values of which each is of another type than some field."""
MOST_NEW = 8
"""Tokens that most requests ask for, so that ten thousand take minutes."""


@dataclass(frozen=True)
class Hostile:
    """A request and what it is counted as."""

    fault: str
    fields: Fields

    @property
    def request(self) -> Request:
        """The request of HELM."""
        return Request(model="fault/matrix", model_deployment="flexgen/fault/matrix", **self.fields)


def characters(generator: random.Random) -> str:
    """Return a short text of any characters but halves of surrogate pairs."""
    ranges = ((0, 0x20), (0x20, 0x7F), (0x80, 0x2FF), (0x590, 0x6FF), (0x2000, 0x206F), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF))
    return "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(generator.randint(1, 30)))


def _other_type(name: str) -> Fault:
    return lambda generator: {name: generator.choice(OTHER_TYPES)}


def _one_of(name: str, *values: Any) -> Fault:
    return lambda generator: {name: generator.choice(values)}


def _sampled(**fields: Any) -> Fault:
    return lambda generator: (
        {"temperature": generator.choice((0.002, 0.7, 1.0, 5.0)), "random": str(generator.random())}
        | {name: generator.choice(values) for name, values in fields.items()}
    )


def _stops(generator: random.Random) -> Fields:
    kinds: tuple[Callable[[], list[Any]], ...] = (
        lambda: [characters(generator) for _ in range(generator.randint(1, 4))],
        lambda: [generator.choice("aeiou tn.,")],
        lambda: [chr(generator.randrange(0x20, 0x7F)) for _ in range(40)],
        lambda: ["x" * 10_000],
        lambda: [f"stop {number}" for number in range(1000)],
        lambda: [""],
        lambda: ["\n", ""],
        lambda: ["\ud800"],
        lambda: [None],
        lambda: [3, "\n"],
        lambda: [["\n"]],
        lambda: [b"\n"],
    )
    return {"stop_sequences": generator.choice(kinds)()}


def _messages(generator: random.Random) -> Fields:
    turn = generator.choice(
        (
            "Hi",
            {},
            None,
            {("a",): 1},
            {"role": "tool", "content": "4"},
            {"role": "user", "content": 4},
            {"role": "user", "content": None},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "user", "content": "\udc00"},
            {"role": "user", "content": "Hi", "name": "x"},
            {"role": ["user"], "content": "Hi"},
            {"role": "user"},
            {"role": "user", "content": "long " * 2000},
        )
    )
    return {"prompt": "", "messages": [*generator.choice(((), CHATS[0])), turn]}


FAULTS: dict[str, Fault] = {
    "prompt of another type": _one_of("prompt", None, b"Hi", ["Hi"], 5, math.nan, object),
    "empty prompt": _one_of("prompt", ""),
    "half of a surrogate pair": _one_of("prompt", "\ud800", "a\udfffb", "\ude00" * 3),
    "random text": lambda generator: {"prompt": characters(generator)},
    "beyond the context": _one_of("prompt", "0" * 5000, "word " * 4000, "\0" * CONTEXT * 2, "é" * 100_000),
    "a token unknown to the model": _one_of("prompt", f"a {UNKNOWN}", UNKNOWN),
    "max_tokens": _one_of("max_tokens", -1, 0, CONTEXT, 10**9, 10**30, -(10**5000), 1),
    "temperature": _one_of("temperature", math.nan, math.inf, -math.inf, -0.5, -1e-300, 10**400, 10**5000),
    "extreme temperature": _one_of("temperature", 1e-300, 1e-4, 1e6, 1e300),
    "top_p": _one_of("top_p", 0, 2, math.nan, -0.1, math.inf, 1e-300, 1 - 1e-16),
    "num_completions": _one_of("num_completions", 0, -1, 10**9, 4097, 2, 5, 50),
    "many completions": lambda generator: {"num_completions": generator.choice((1000, *[100] * 9)), "max_tokens": 2},
    "top_k_per_token": _one_of("top_k_per_token", -1, 0, 2, 5, 400, 401, 10**6, 10**30),
    "penalties": lambda generator: {
        generator.choice(("presence_penalty", "frequency_penalty")): generator.choice((1.0, math.nan, None, "0", -1e-300, 0.0))
    },
    "seed": lambda generator: {"random": generator.choice(("", "\ud800", "1" * 5000, "\0", 3, b"1", True)), "temperature": 1.0},
    "samples": _sampled(num_completions=(1, 2, 5), top_p=(1, 0.5, 1e-9), top_k_per_token=(1, 3)),
    "stop sequences": _stops,
    "stop sequences of another type": _one_of("stop_sequences", "\n", None, ("\n",), {"\n": 1}, 3),
    "echo of a prompt": lambda generator: {"echo_prompt": True, "max_tokens": 0},
    "echo of a completion": _one_of("echo_prompt", True),
    "embedding": _one_of("embedding", True, "False", None, 0),
    "images": lambda generator: generator.choice(
        ({"multimodal_prompt": IMAGE}, {"image_generation_parameters": ImageGenerationParameters()})
    ),
    "response format": lambda generator: {"response_format": ResponseFormat(json_schema={})},
    "messages": _messages,
    "messages and a prompt": lambda generator: {"messages": generator.choice(CHATS)},
    "no messages": lambda generator: {"prompt": "", "messages": generator.choice(([], "Hi", (), {}, 3))},
    **{
        f"{name} of another type": _other_type(name)
        for name in ("max_tokens", "temperature", "top_p", "num_completions", "top_k_per_token", "echo_prompt", "random")
    },
}
"""What may be wrong with a request, or is only unusual."""
ORDINARY_SHARE = 0.3
SEVERAL_SHARE = 0.25
"""Of the others, those with two or three faults at once."""


def hostile_requests(count: int, seed: str) -> list[Hostile]:
    """Make requests: three in ten are ordinary, the others have one to three faults."""
    generator = random.Random(seed)
    return [_request(generator) for _ in range(count)]


def _request(generator: random.Random) -> Hostile:
    fields: Fields = {
        "prompt": generator.choice(PROMPTS),
        "max_tokens": generator.randint(1, MOST_NEW),
        "temperature": 0.0,
    }
    if generator.random() < 0.1:
        fields |= {"prompt": "", "messages": generator.choice(CHATS)}
    elif generator.random() < 0.2:
        fields |= {"max_tokens": 0, "echo_prompt": True}
    if generator.random() < ORDINARY_SHARE:
        return Hostile("ordinary", fields)
    several = generator.random() < SEVERAL_SHARE
    names = generator.sample(list(FAULTS), generator.randint(2, 3) if several else 1)
    for name in names:
        fields |= FAULTS[name](generator)
    return Hostile("several faults" if several else names[0], fields)
