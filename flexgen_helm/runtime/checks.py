"""Self-check at load: what would be silently wrong is refused before the first job (facts behind it: docs/architecture.md)."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexgen_helm.errors import FlexGenError, UnsupportedModel
from flexgen_helm.memory.cache import PagedCache
from flexgen_helm.memory.pages import PAGE_TOKENS, num_pages
from flexgen_helm.runtime.executor import SerialExecutor
from flexgen_helm.runtime.recorder import RecordedModel
from flexgen_helm.schedule.rows import Segment, Sweep, Want, pack_prefill
from flexgen_helm.schedule.tree import Node
from flexgen_helm.types import Policy

TOLERANCE = 1e-3
"""Largest difference of a log-probability in fp32: 16 times what equal models show, 18 times below what wrong ones do."""
FAR_POSITION = 16_384
Cuts = tuple[tuple[int, int], tuple[int, int]]
CUTS: Cuts = ((21, 11), (13, 12))
"""(length, first part) of two sequences: packed in one row, continued in the next, in the other order."""
LONG_CUTS: Cuts = ((300, 187), (29, 7))


@dataclass(frozen=True)
class Verdict:
    """What the self-check measured on this machine."""

    worst_difference: float
    """Against the library's own forward, over all log-probabilities."""
    bit_stable: bool
    """Whether packed and continued sequences gave the bits of sequences alone (level B)."""
    cache_bytes_per_token: int
    """K and V of one token in all layers."""


def self_check(model: RecordedModel, policy: Policy, *, max_length: int) -> Verdict:
    """Compare packed and continued sequences with the library's own forward.

    16-bit models are compared in fp32, on a copy of their first layers that holds one layer of every kind.

    Raises:
        UnsupportedModel: If they differ, or if the model does anything that this runtime cannot honour.
    """
    try:
        with torch.inference_mode():
            exact = model if model.model.dtype == torch.float32 else RecordedModel(_short_copy(model))
            cache = PagedCache()
            worst = _difference(exact, policy, max_length, cache)
            if exact is not model:
                _run(model, policy, _whole(_sequences(model, CUTS, max_length)[1]), cache=(cache := PagedCache()))
            return Verdict(worst, _bit_stable(model, policy, max_length), sum(cache.bytes_per_token.values()))
    except FlexGenError:
        raise
    except Exception as error:
        raise UnsupportedModel(f"packed rows fail in its own code ({type(error).__name__}: {error})") from error


def _difference(model: RecordedModel, policy: Policy, max_length: int, cache: PagedCache) -> float:
    sequences = _sequences(model, CUTS, max_length)
    with model.plain() as plain:
        expected = [_plain_logprobs(plain, tokens) for tokens in sequences]
    got = _packed(model, policy, sequences, CUTS)
    worst = max(float((a - b).abs().nan_to_num(torch.inf).max()) for a, b in zip(expected, got, strict=True))
    if worst > TOLERANCE:
        raise UnsupportedModel(
            f"packed and continued sequences differ from the library's own forward by {worst:.3g} in log-probability "
            f"(tolerance {TOLERANCE:g}): the model keeps state beside attention or takes positions from elsewhere"
        )
    beside_far = _beside_far_neighbour(model, policy, (sequences[1], max_length), cache)
    moved = float((beside_far - expected[1]).abs().nan_to_num(torch.inf).max())
    if moved > TOLERANCE:
        raise UnsupportedModel(f"a neighbour at a far position moves a sequence's log-probabilities by {moved:.3g}")
    return max(worst, moved)


def _bit_stable(model: RecordedModel, policy: Policy, max_length: int) -> bool:
    """Level B over several chunks of keys, on the first layers: neither neighbours nor cuts change a bit."""
    with model.shortened(_num_layers_of_every_kind(model)) as short:
        few = RecordedModel(short)
        sequences = _sequences(few, LONG_CUTS, max_length)
        packed = _packed(few, policy, sequences, LONG_CUTS)
        alone = [_run(few, policy, _whole(tokens))[0] for tokens in sequences]
    return all(torch.equal(a, b) for a, b in zip(packed, alone, strict=True))


def _sequences(model: RecordedModel, cuts: Cuts, max_length: int) -> list[tuple[int, ...]]:
    vocab = model.model.config.get_text_config(decoder=True).vocab_size
    # Neither of the first ids, which are often special, nor of the rest of a large vocabulary, which may be image tokens.
    top, chance = min(vocab, 50_000), random.Random(17)
    return [tuple(chance.randrange(top // 50, top) for _ in range(min(length, max_length))) for length, _ in cuts]


def _plain_logprobs(model: PreTrainedModel, tokens: tuple[int, ...]) -> Tensor:
    logits = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)


def _packed(model: RecordedModel, policy: Policy, sequences: list[tuple[int, ...]], cuts: Cuts) -> list[Tensor]:
    """Log-probabilities ``[length, vocab]`` of each sequence, both packed into rows, cut, and continued in later rows."""
    a, b = (min(cut, len(tokens) - 1) for tokens, (_, cut) in zip(sequences, cuts, strict=True))
    first = _segments(sequences, [(0, 0, a), (1, 0, b)])
    second = _segments(sequences, [(1, b, len(sequences[1])), (0, a, len(sequences[0]))])
    parts = _run(model, policy, first, second)
    return [torch.cat([parts[0], parts[3]]), torch.cat([parts[1], parts[2]])]


def _segments(sequences: list[tuple[int, ...]], cuts: list[tuple[int, int, int]]) -> list[Segment]:
    """Segments (sequence, first, last), every position wanted; each sequence has pages of its own."""
    size = max(num_pages(0, len(tokens)) for tokens in sequences)
    return [
        Segment(sequences[i][a:b], a, list(range(i * size, (i + 1) * size)), True, None, _all_wanted(b - a)) for i, a, b in cuts
    ]


def _whole(tokens: tuple[int, ...]) -> list[Segment]:
    return _segments([tokens], [(0, 0, len(tokens))])


def _all_wanted(count: int) -> list[Want]:
    marker = Node(None, 0, ())
    return [Want(i, ((marker, i),), ()) for i in range(count)]


def _run(
    model: RecordedModel, policy: Policy, first: list[Segment], second: Sequence[Segment] = (), cache: PagedCache | None = None
) -> list[Tensor]:
    """Run segments in one sweep, the second ones in rows of their own; log-probabilities of each segment, in order."""
    rows = pack_prefill(first, policy) + pack_prefill(second, policy)
    cache = PagedCache() if cache is None else cache
    cache.reserve(kept=1 + max(page for row in rows for segment in row.segments for page in segment.table), transient=0)
    found: list[tuple[Node, Tensor]] = []

    def keep(wants: list[Want], logits: Tensor) -> None:
        found.extend((want.targets[0][0], logprob) for want, logprob in zip(wants, torch.log_softmax(logits, -1), strict=True))

    SerialExecutor(model, cache, head_slice=policy.gpu_batch_size).run(Sweep(rows), keep)
    markers = dict.fromkeys(marker for marker, _ in found)
    return [torch.stack([logprob for marker, logprob in found if marker is wanted]) for wanted in markers]


def _beside_far_neighbour(
    model: RecordedModel, policy: Policy, sequence: tuple[tuple[int, ...], int], cache: PagedCache
) -> Tensor:
    """A short sequence beside one near the end of the context, whose page table is one page over and over."""
    tokens, max_length = sequence
    near = _whole(tokens)[0]
    start = min(max_length, FAR_POSITION) - 3
    far = Segment(tokens[:3], start, [len(near.table)] * (start // PAGE_TOKENS + 2), True)
    return _run(model, policy, [far, near], cache=cache)[0]


def _short_copy(model: RecordedModel) -> PreTrainedModel:
    """An fp32 copy of a model, cut to its first layers so that one of every kind is left."""
    with model.shortened(_num_layers_of_every_kind(model)) as short:
        duplicate = copy.deepcopy(short)
    duplicate.float()
    return duplicate


def _num_layers_of_every_kind(model: RecordedModel) -> int:
    types = getattr(model.model.config.get_text_config(decoder=True), "layer_types", None) or [None] * len(model.layers)
    kinds = [
        (type(layer), kind, tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()))
        for layer, kind in zip(model.layers, types, strict=False)
    ]
    return max(min(2, len(kinds)), max(kinds.index(kind) for kind in kinds) + 1)
