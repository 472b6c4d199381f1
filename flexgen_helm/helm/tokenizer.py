"""HELM's Hugging Face tokenizer without its cache, with the tokenizer that the engine reads."""

from __future__ import annotations

import os

from helm.common.cache import BlackHoleCacheConfig
from helm.common.tokenization_request import TokenizationRequest, TokenizationRequestResult
from helm.proxy.retry import NonRetriableException
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer, WrappedPreTrainedTokenizer

from flexgen_helm.errors import FlexGenError


class FlexGenTokenizer(HuggingFaceTokenizer):
    """Tokenizer of flexgen deployments.

    HELM would keep every tokenised text in SQLite, where looking it up takes several times as long as tokenising it.
    """

    def __init__(self, tokenizer_name: str, pretrained_model_name_or_path: str, revision: str | None = None) -> None:
        """Args: tokenizer_name: HELM's name. pretrained_model_name_or_path, revision: As in ``transformers``."""
        options = {} if revision is None else {"revision": revision}
        super().__init__(BlackHoleCacheConfig(), tokenizer_name, pretrained_model_name_or_path, **options)
        self._source, self._revision = pretrained_model_name_or_path, revision

    def get_wrapped_tokenizer(self) -> WrappedPreTrainedTokenizer:
        """Return the tokenizer, which HELM keeps by its name; read first where it is not known.

        Raises:
            NonRetriableException: The model has no tokenizer, or its files cannot be read.
        """
        with HuggingFaceTokenizer._tokenizers_lock:
            if self._helm_tokenizer_name not in HuggingFaceTokenizer._tokenizers:
                HuggingFaceTokenizer._tokenizers[self._helm_tokenizer_name] = self._read()
        return super().get_wrapped_tokenizer()

    def _read(self) -> WrappedPreTrainedTokenizer:
        from flexgen_helm.loading.hub_folder import folder_without_weights
        from flexgen_helm.loading.tokenizer_files import read_tokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "False"  # as HELM does, which may fork
        try:
            tokenizer = read_tokenizer(self._source, folder_without_weights(self._source, self._revision))
        except FlexGenError as error:
            raise NonRetriableException(str(error)) from error
        if tokenizer is None:
            raise NonRetriableException(
                f"{self._source} has no tokenizer, but HELM's prompts are texts. Put a tokenizer.json into the folder."
            )
        return WrappedPreTrainedTokenizer(tokenizer)

    def tokenize(self, request: TokenizationRequest) -> TokenizationRequestResult:
        """Tokenise a text.

        Raises:
            NonRetriableException: The text cannot be tokenised. HELM would try it again for half a minute.
        """
        try:
            request.text.encode()
            return super().tokenize(request)
        except UnicodeEncodeError as error:
            raise NonRetriableException(
                f"{error}. Text must have a UTF-8 form, which half of a surrogate pair has not. Clean the data of the scenario."
            ) from error
        except ValueError as error:
            raise NonRetriableException(str(error)) from error
