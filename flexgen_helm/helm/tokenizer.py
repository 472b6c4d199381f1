"""HELM's Hugging Face tokenizer without its cache."""

from __future__ import annotations

from helm.common.cache import BlackHoleCacheConfig
from helm.common.tokenization_request import TokenizationRequest, TokenizationRequestResult
from helm.proxy.retry import NonRetriableException
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer


class FlexGenTokenizer(HuggingFaceTokenizer):
    """Tokenizer of flexgen deployments.

    HELM would keep every tokenised text in SQLite, where looking it up takes several times as long as tokenising it.
    """

    def __init__(self, tokenizer_name: str, pretrained_model_name_or_path: str, revision: str | None = None) -> None:
        """Args: tokenizer_name: HELM's name. pretrained_model_name_or_path, revision: As in ``transformers``."""
        options = {} if revision is None else {"revision": revision}
        super().__init__(BlackHoleCacheConfig(), tokenizer_name, pretrained_model_name_or_path, **options)

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
