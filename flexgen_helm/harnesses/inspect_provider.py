"""The provider `flexgen` of Inspect: requests that are in flight at the same time share the engine's sweeps."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput
from inspect_ai.tool import ToolChoice, ToolInfo

from flexgen_helm.errors import FlexGenError, InvalidJob
from flexgen_helm.generation.vocabulary import Vocabulary
from flexgen_helm.harnesses.inspect_requests import Requests, in_inspects_words, refuse, to_output
from flexgen_helm.harnesses.late_engine import LateEngine

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
"""Requests in flight, where Inspect asks for a number. Those that are in flight together are computed together."""
FEW_CONNECTIONS = (
    "Inspect sends 20 requests at a time and later at most 100, of which one sweep is made. Give --max-connections %d "
    "(max_connections=%d in Python): more requests in a sweep take less time each."
)


class FlexGenAPI(ModelAPI):
    """Models named ``flexgen/<folder or hub name>[@<variant>]``; model arguments are options of `Engine.from_pretrained`."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        use_chat_template: bool | None = None,
        **options: Any,
    ) -> None:
        """Open a model; its weights are read when the first request comes.

        Args:
            model_name: A model folder or a name on the hub, with `@w4` and the like for a compressed variant.
            base_url: Not for a model on this machine.
            api_key: Likewise.
            config: Settings that all requests share.
            use_chat_template: Whether the model's chat template writes prompts; None: if it has one. Otherwise the prompt is
                the text of the only message.
            options: Options of `Engine.from_pretrained`.

        Raises:
            FlexGenError: If there is no such option or model, or the model is refused, or has no tokenizer.
        """
        if base_url is not None:
            raise FlexGenError(f"model_base_url is {base_url!r}, but flexgen runs the model on this machine. Leave it out.")
        super().__init__(model_name, None, api_key, [], config or GenerateConfig())
        self.late = LateEngine(model_name, **options)
        tokenizer = self.late.tokenizer
        template = bool(tokenizer.chat_template) if use_chat_template is None else use_chat_template
        self._requests = Requests(tokenizer, self.late.max_length, use_chat_template=template)
        self._vocabulary = Vocabulary(tokenizer)
        self._told = False

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one request; it joins the next sweep, with all others that are in flight.

        Raises:
            FlexGenError: If the request cannot be served, or the engine cannot be made.
        """
        _refuse_trio()
        self._recommend_connections(config)
        begin = time.perf_counter()
        try:
            refuse(config, tools)
            job = self._requests.job(input, config)
            engine = self.late.loaded
            if engine is None:
                engine = await asyncio.to_thread(self.late.get)
            result = await asyncio.wrap_future(engine.submit(job))
        except InvalidJob as error:
            raise in_inspects_words(error) from None
        return to_output(self.model_name, result, config, self._vocabulary, time.perf_counter() - begin)

    def _recommend_connections(self, config: GenerateConfig) -> None:
        """Say once if Inspect adapts the number of requests in flight, which begins with few and ends below a block."""
        if not self._told and config.max_connections is None and config.adaptive_connections in (None, True):
            logger.warning(FEW_CONNECTIONS, MAX_CONNECTIONS, MAX_CONNECTIONS)
        self._told = True

    def max_connections(self) -> int:
        """Requests in flight, where Inspect neither adapts their number nor is told one."""
        return MAX_CONNECTIONS

    def connection_key(self) -> str:
        """Each model of this provider has connections of its own."""
        return str(self.model_name)

    def collapse_user_messages(self) -> bool:
        """Most chat templates want turns of user and assistant that alternate."""
        return True

    def collapse_assistant_messages(self) -> bool:
        """Likewise."""
        return True

    async def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens."""
        return list(self.late.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    async def count_text_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(await self.tokenize(text))

    def close(self) -> None:
        """Close the engine and free its memory. The next request loads the model again."""
        self.late.close()


def _refuse_trio() -> None:
    """Refuse Inspect's other backend, in which nobody would hear that an answer is there."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise FlexGenError("flexgen needs Inspect's asyncio backend. Unset INSPECT_ASYNC_BACKEND.") from None
