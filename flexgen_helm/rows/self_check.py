"""Self-check at load, shared by both kinds of rows: a model that would be silently wrong is refused before the first job."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen_helm.attention.paged.trial import HeadShape
from flexgen_helm.errors import FlexGenError, OutOfSpace, UnsupportedModel
from flexgen_helm.execution.interfaces import Executor
from flexgen_helm.loading.source import LoadedModel
from flexgen_helm.memory.out_of_memory import is_out_of_device_memory
from flexgen_helm.model.layers import num_layers_of_every_kind
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.schedule.rows import LogitRequest, Sweep
from flexgen_helm.schedule.tree import Scores

TOLERANCE = 1e-3
"""Largest accepted difference of a log-probability in fp32: 16 times that of correct models, 1/18 of that of wrong ones."""
ALL_COMPARED = 32
"""Length in tokens up to which all positions of a sequence are compared."""
STRIDE = 8
"""Every eighth position of a longer sequence is compared, and its last eight."""
Tokens = tuple[int, ...]
FirstLayers = Callable[[], LoadedModel]
Cuts = Sequence[tuple[int, int]]
"""(length, tokens before the cut) of each sequence."""


class NotNumbers(UnsupportedModel):
    """A model whose log-probabilities are NaN for the random tokens of the self-check, in any kind of rows."""


@dataclass(frozen=True)
class LayerCache:
    """Bytes that one layer adds to the cache."""

    per_token: tuple[int, ...]
    """Bytes for each token: in packed rows of K and V of each attention call, in single rows one sum."""
    per_sequence: int = 0
    """Bytes for each sequence, of any length, in addition to those for its tokens."""


@dataclass(frozen=True)
class Verdict:
    """Result of a self-check that a model passed, measured on this machine."""

    worst_difference: float
    """Largest difference from transformers' own forward, over all log-probabilities."""
    bit_stable: bool | None
    """Whether sequences gave the same bits among others and alone (level B); None: not measured on the device that computes."""
    layers: tuple[LayerCache, ...]
    """Cache sizes of each layer of the model that was checked, in its dtype."""
    heads: tuple[HeadShape, ...] = ()
    """Heads of its attention calls, one of every kind; none in single rows."""

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that a token adds to the cache in all layers."""
        return sum(sum(layer.per_token) for layer in self.layers)

    @property
    def cache_bytes_per_sequence(self) -> int:
        """Bytes that a sequence of any length adds to the cache in all layers, in addition to those for its tokens."""
        return sum(layer.per_sequence for layer in self.layers)

    def of_all_layers(self, kinds: Sequence[int]) -> Verdict:
        """Return the verdict for the whole model, after its first layers were checked.

        Args:
            kinds: For each layer of the whole model, the number of the first layer of its kind (`layer_kinds`).
        """
        return dataclasses.replace(self, layers=tuple(self.layers[kind] for kind in kinds))


@contextmanager
def as_refusal() -> Iterator[None]:
    """Turn an error in a model's own code into a refusal.

    Raises:
        UnsupportedModel: If the model's code fails.
        OutOfSpace: If the self-check needs more memory than there is.
    """
    try:
        with torch.inference_mode():
            yield
    except FlexGenError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or is_out_of_device_memory(error):
            raise OutOfSpace(
                f"The self-check needs more memory than there is ({error}). Free memory, or use device='cpu'."
            ) from error
        raise UnsupportedModel(f"its own code fails ({type(error).__name__}: {error})") from error


def random_sequences(model: RecordedModel, cuts: Cuts, max_length: int) -> list[Tokens]:
    """Return random token sequences with the lengths in `cuts`, at most ``max_length`` tokens each."""
    vocab = model.model.config.get_text_config(decoder=True).vocab_size
    # The first ids are often special, and the last ids of a large vocabulary may be image tokens: both are left out.
    top, chance = min(vocab, 50_000), random.Random(17)
    return [tuple(chance.randrange(top // 50, top) for _ in range(min(length, max_length))) for length, _ in cuts]


def cut_points(sequences: list[Tokens], cuts: Cuts) -> list[int]:
    """Return the number of tokens before each sequence's cut, so that at least one token is left after it."""
    return [min(cut, len(tokens) - 1) for tokens, (_, cut) in zip(sequences, cuts, strict=True)]


def compared(length: int) -> list[int]:
    """Return the positions of a sequence whose log-probabilities are compared; a sample of a long one, to save memory."""
    return [i for i in range(length) if length <= ALL_COMPARED or i % STRIDE == STRIDE - 1 or i >= length - STRIDE]


def plain_logprobs(model: RecordedModel, sequences: list[Tokens]) -> list[Tensor]:
    """Return log-probabilities ``[compared, vocab]`` of each sequence alone, by transformers' own forward.

    Raises:
        NotNumbers: If any of them is NaN.
    """
    found = []
    with model.plain() as plain:
        for tokens in sequences:
            positions = torch.tensor(compared(len(tokens)), device=model.device)
            keep = {"logits_to_keep": positions} if model.takes("logits_to_keep") else {}
            logits = plain(input_ids=torch.tensor([tokens], device=model.device), use_cache=False, **keep).logits[0]
            found.append(torch.log_softmax((logits if keep else logits[positions]).float(), -1))
    require_numbers(found)
    return found


def worst_difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """Return the largest absolute difference of any entry; infinite if one side is NaN. Equal infinities are equal."""
    differences = [torch.where(a == b, 0.0, a - b) for a, b in zip(expected, got, strict=True)]
    return max(float(difference.abs().nan_to_num(torch.inf).max()) for difference in differences)


def require_numbers(logprobs: list[Tensor]) -> None:
    """Refuse log-probabilities that cannot be compared. -inf is accepted: the model suppresses such a token.

    Raises:
        NotNumbers: If any of them is NaN.
    """
    if any(bool(found.isnan().any()) for found in logprobs):
        raise NotNumbers("its log-probabilities of random tokens are not finite")


def compared_requests(length: int, start: int, end: int) -> list[LogitRequest]:
    """Return requests for the `compared` positions in ``[start, end)`` of a sequence, marked for `sweep_logprobs`."""
    marker = Scores(())
    return [LogitRequest(i - start, ((marker, i),), ()) for i in compared(length) if start <= i < end]


def sweep_logprobs(executor: Executor, sweep: Sweep) -> list[Tensor]:
    """Run a sweep and return log-probabilities ``[requested, vocab]`` of each segment with `compared_requests`, in order."""
    found: list[tuple[Scores, Tensor]] = []

    def keep(logit_requests: list[LogitRequest], logits: Tensor) -> None:
        found.extend(
            (request.targets[0][0], logprob)
            for request, logprob in zip(logit_requests, torch.log_softmax(logits, -1), strict=True)
        )

    executor.run(sweep, keep)
    markers = dict.fromkeys(marker for marker, _ in found)
    return [torch.stack([logprob for marker, logprob in found if marker is requested]) for requested in markers]


def in_fp32(model: RecordedModel, first: FirstLayers | None = None) -> RecordedModel:
    """Return the model if it is in fp32, else its first layers in fp32, as many as include every kind of layer.

    Args:
        model: The model.
        first: Reads the first layers anew, with a small vocabulary; None: they are copied, with the whole vocabulary.
    """
    if model.model.dtype == torch.float32:
        return model
    if first is not None:
        return RecordedModel(first().model.float(), compiled=model.compiled)
    with model.shortened(num_layers_of_every_kind(model.model, model.layers)) as short:
        duplicate = copy.deepcopy(short)
    return RecordedModel(duplicate.float(), own=model.own, compiled=model.compiled)


@contextmanager
def first_layers(model: RecordedModel) -> Iterator[RecordedModel]:
    """Yield the model cut to its first layers, so that one of every kind is left."""
    with model.shortened(num_layers_of_every_kind(model.model, model.layers)) as short:
        yield RecordedModel(short, own=model.own, compiled=model.compiled)
