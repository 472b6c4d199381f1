"""Window service of flexgen deployments: HELM's own, with limits read from the model and an endless loop refused."""

from __future__ import annotations

from helm.benchmark.window_services.local_window_service import LocalWindowService
from helm.benchmark.window_services.tokenizer_service import TokenizerService
from helm.common.tokenization_request import TokenizationToken

from flexgen_helm.errors import InvalidJob
from flexgen_helm.helm.deployment import DeploymentError
from flexgen_helm.helm.model_files import read_limits


class FlexGenWindowService(LocalWindowService):
    """Cuts prompts to the model's context."""

    def __init__(  # noqa: PLR0913 - HELM's signature
        self,
        service: TokenizerService,
        tokenizer_name: str,
        name_or_path: str,
        revision: str | None = None,
        max_sequence_length: int | None = None,
        max_request_length: int | None = None,
        max_sequence_and_generated_tokens_length: int | None = None,
        end_of_text_token: str | None = None,
        prefix_token: str | None = None,
    ) -> None:
        """Args: name_or_path, revision: The model. The smallest of its window and of the lengths in tokens is the limit.

        Raises:
            DeploymentError: A length is below 1.
        """
        lengths = {
            "max_sequence_length": max_sequence_length,
            "max_request_length": max_request_length,
            "max_sequence_and_generated_tokens_length": max_sequence_and_generated_tokens_length,
        }
        given = {name: length for name, length in lengths.items() if length is not None}
        for name, length in given.items():
            if length < 1:
                raise DeploymentError(
                    f"`{name}: {length}` of the deployment leaves no room for a prompt. Give at least 1, or leave it out for "
                    "the model's context."
                )
        window = min([*given.values(), read_limits(name_or_path, revision).window])
        super().__init__(
            service=service,
            tokenizer_name=tokenizer_name,
            # Language modelling puts the prefix token before a first window of this length. Were there no room for it, HELM
            # would drop the window's last token and never count it.
            max_sequence_length=window - bool(prefix_token),
            max_request_length=window,
            end_of_text_token=end_of_text_token,
            prefix_token=prefix_token,
        )

    def decode(self, tokens: list[TokenizationToken], normalized_text: str | None = None) -> str:
        """Return the text of tokens; behind a prefix token that of a document, if it is tokenised into the same tokens.

        SentencePiece tokenizers begin a text with a space that they do not show. Behind a prefix token many show it, and
        some begin with a further one when they read it.
        """
        text: str = super().decode(tokens, normalized_text)
        if self.prefix_token and text.startswith(self.prefix_token):
            apart: str = self.prefix_token + super().decode(tokens[1:], normalized_text)
            return apart if apart != text and self.encode(apart).tokens == tokens else text
        return text

    def fits_within_context_window(self, text: str, expected_completion_token_length: int = 0) -> bool:
        """Return whether prompt and completion fit.

        Raises:
            InvalidJob: The completion alone fills the context. HELM would remove one character after another from the
                prompt and, when none is left, go on for ever.
        """
        if expected_completion_token_length >= self.max_request_length:
            raise InvalidJob(
                f"The run asks for completions of {expected_completion_token_length} tokens, but prompt and completion "
                f"together have room for {self.max_request_length}, so no prompt fits. Choose a model with a longer "
                "context or a run entry with a smaller max_tokens."
            )
        fits: bool = super().fits_within_context_window(text, expected_completion_token_length)
        return fits
