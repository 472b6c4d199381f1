"""Self-check at load, what both kinds of rows have in common: what would be silently wrong is refused before the first job."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen_helm.errors import FlexGenError, OutOfSpace, UnsupportedModel
from flexgen_helm.execution.interfaces import Executor
from flexgen_helm.model.layers import num_layers_of_every_kind
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.schedule.rows import LogitRequest, Sweep
from flexgen_helm.schedule.tree import Scores

TOLERANCE = 1e-3
"""Largest difference of a log-probability in fp32: 16 times what equal models show, 18 times below what wrong ones do."""
ALL_COMPARED = 32
"""Length up to which all positions of a sequence are compared."""
STRIDE = 8
Tokens = tuple[int, ...]
Cuts = Sequence[tuple[int, int]]
"""(length, first part) of each sequence."""


class NotNumbers(UnsupportedModel):
    """The model gives NaN or infinity for the random tokens of the self-check, in rows of whatever kind."""


@dataclass(frozen=True)
class LayerCache:
    """What one layer adds to the cache, in bytes."""

    per_token: tuple[int, ...]
    """For each token: in packed rows K and V of each attention call, in single rows all of it as one."""
    per_sequence: int = 0
    """For each sequence of any length beside it."""


@dataclass(frozen=True)
class Verdict:
    """What the self-check measured on this machine."""

    worst_difference: float
    """Against transformers' own forward, over all log-probabilities."""
    bit_stable: bool
    """Whether sequences among others gave the bits of sequences alone (level B)."""
    layers: tuple[LayerCache, ...]
    """Of the model that was checked, in its dtype."""

    @property
    def cache_bytes_per_token(self) -> int:
        """What a token adds to the cache, all layers together."""
        return sum(sum(layer.per_token) for layer in self.layers)

    @property
    def cache_bytes_per_sequence(self) -> int:
        """What a sequence of any length keeps beside it."""
        return sum(layer.per_sequence for layer in self.layers)

    def of_all_layers(self, kinds: Sequence[int]) -> Verdict:
        """The verdict on a model of which the first layers were checked.

        Args:
            kinds: For each layer of the whole model the first one of its kind; see `flexgen_helm.model.layers.layer_kinds`.
        """
        return dataclasses.replace(self, layers=tuple(self.layers[kind] for kind in kinds))


@contextmanager
def as_refusal() -> Iterator[None]:
    """Turn an error in a model's own code into a refusal."""
    try:
        with torch.inference_mode():
            yield
    except FlexGenError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfSpace(
            f"The self-check needs more memory than there is ({error}). Free memory, or use device='cpu'."
        ) from error
    except Exception as error:
        raise UnsupportedModel(f"its own code fails ({type(error).__name__}: {error})") from error


def random_sequences(model: RecordedModel, cuts: Cuts, max_length: int) -> list[Tokens]:
    """Sequences to compare on, not longer than the context."""
    vocab = model.model.config.get_text_config(decoder=True).vocab_size
    # Neither of the first ids, which are often special, nor of the rest of a large vocabulary, which may be image tokens.
    top, chance = min(vocab, 50_000), random.Random(17)
    return [tuple(chance.randrange(top // 50, top) for _ in range(min(length, max_length))) for length, _ in cuts]


def cut_points(sequences: list[Tokens], cuts: Cuts) -> list[int]:
    """Where each sequence is cut, so that something is left behind the cut."""
    return [min(cut, len(tokens) - 1) for tokens, (_, cut) in zip(sequences, cuts, strict=True)]


def compared(length: int) -> list[int]:
    """Positions of a sequence whose log-probabilities are compared: not all of a long one, since vocabularies are large."""
    return [i for i in range(length) if length <= ALL_COMPARED or i % STRIDE == STRIDE - 1 or i >= length - STRIDE]


def plain_logprobs(model: RecordedModel, sequences: list[Tokens]) -> list[Tensor]:
    """Log-probabilities ``[compared, vocab]`` of each sequence alone, by transformers' own forward.

    Raises:
        NotNumbers: If they are none.
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
    """Largest difference of any entry; infinite where one side is not a number. Equal infinities are equal."""
    differences = [torch.where(a == b, 0.0, a - b) for a, b in zip(expected, got, strict=True)]
    return max(float(difference.abs().nan_to_num(torch.inf).max()) for difference in differences)


def require_numbers(logprobs: list[Tensor]) -> None:
    """Refuse a model by whose log-probabilities nothing can be compared; -inf is that of a token that the model suppresses.

    Raises:
        NotNumbers: If there is NaN among them.
    """
    if any(bool(found.isnan().any()) for found in logprobs):
        raise NotNumbers("its log-probabilities of random tokens are not finite")


def compared_requests(length: int, start: int, end: int) -> list[LogitRequest]:
    """Requests for what is `compared` of a sequence's tokens ``[start, end)``, as `sweep_logprobs` tells segments apart."""
    marker = Scores(())
    return [LogitRequest(i - start, ((marker, i),), ()) for i in compared(length) if start <= i < end]


def sweep_logprobs(executor: Executor, sweep: Sweep) -> list[Tensor]:
    """Log-probabilities ``[requested, vocab]`` of each segment of a sweep, in order; all have some of `compared_requests`."""
    found: list[tuple[Scores, Tensor]] = []

    def keep(logit_requests: list[LogitRequest], logits: Tensor) -> None:
        found.extend(
            (request.targets[0][0], logprob)
            for request, logprob in zip(logit_requests, torch.log_softmax(logits, -1), strict=True)
        )

    executor.run(sweep, keep)
    markers = dict.fromkeys(marker for marker, _ in found)
    return [torch.stack([logprob for marker, logprob in found if marker is requested]) for requested in markers]


def in_fp32(model: RecordedModel) -> RecordedModel:
    """The model itself, or an fp32 copy of its first layers that holds one layer of every kind."""
    if model.model.dtype == torch.float32:
        return model
    with model.shortened(num_layers_of_every_kind(model.model, model.layers)) as short:
        duplicate = copy.deepcopy(short)
    return RecordedModel(duplicate.float(), own=model.own)


@contextmanager
def first_layers(model: RecordedModel) -> Iterator[RecordedModel]:
    """The model cut to its first layers, so that one of every kind is left."""
    with model.shortened(num_layers_of_every_kind(model.model, model.layers)) as short:
        yield RecordedModel(short, own=model.own)
