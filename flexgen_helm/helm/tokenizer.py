"""HELM's Hugging Face tokenizer without its cache."""

from __future__ import annotations

from helm.common.cache import BlackHoleCacheConfig
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer


class FlexGenTokenizer(HuggingFaceTokenizer):
    """Tokenizer of flexgen deployments.

    HELM would keep every tokenised text in SQLite, where looking it up takes several times as long as tokenising it.
    """

    def __init__(self, tokenizer_name: str, pretrained_model_name_or_path: str, revision: str | None = None) -> None:
        """Args: tokenizer_name: HELM's name. pretrained_model_name_or_path, revision: As in ``transformers``."""
        options = {} if revision is None else {"revision": revision}
        super().__init__(BlackHoleCacheConfig(), tokenizer_name, pretrained_model_name_or_path, **options)
