"""Packed rows: tokens of many sequences in one row, with this package's attention and with K and V in pages."""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from flexgen_helm.attention.decode import DecodeAttention
from flexgen_helm.attention.host import HostAttention
from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.paged import trial
from flexgen_helm.attention.paged.trial import HeadShape
from flexgen_helm.attention.row import AttendTiles, RowAttention
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.kv_cache.page_format import CacheKey
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import Form
from flexgen_helm.memory.copies import upload
from flexgen_helm.memory.link import Transfer
from flexgen_helm.model.cache_argument import cache_places
from flexgen_helm.model.experts import register_sliced_experts
from flexgen_helm.model.recorder import Implementations, RecordedModel, Recording
from flexgen_helm.schedule.dependencies import rows_at_once
from flexgen_helm.schedule.rows import Row, Sweep, host_attended
from flexgen_helm.types import Kernel

HARMLESS_ARGUMENTS = frozenset(
    (
        *("dropout", "sliding_window", "position_ids", "position_embeddings", "cache_position", "use_cache", "is_causal"),
        *("output_attentions", "output_hidden_states", "return_dict", "logits_to_keep"),
    )
)
"""Arguments of an attention function that change nothing in addition to our mask, positions and scale."""
PADDING_TOKEN = 0
_names = itertools.count()


@dataclass(kw_only=True)
class PackedRecording(Recording):
    """A recorded row that holds tokens of many sequences."""

    positions: Tensor
    """Position of each token in its own sequence, ``[T]``."""
    attention: RowAttention
    """Attention of the row's queries to K and V in pages."""


class _CacheProbe:
    """A stand-in for the cache at replay: returns K and V unchanged, knows each token's past length, and refuses all else."""

    def __init__(self, positions: Tensor) -> None:
        self.__dict__["_past"] = positions - torch.arange(len(positions), device=positions.device)

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return k, v

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Tensor:
        past: Tensor = self.__dict__["_past"]
        return past

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedModel(f"a layer keeps state other than K and V: it asks the cache for '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnsupportedModel(f"a layer keeps state other than K and V: it writes '{name}' into the cache")

    @classmethod
    def of_past(cls, past: Iterable[Tensor], _: object) -> _CacheProbe:
        """Return the probe that knows the past lengths, as compiled layers take it apart and put it together."""
        probe = object.__new__(cls)
        (probe.__dict__["_past"],) = past
        return probe


register_pytree_node(_CacheProbe, lambda probe: ([probe.__dict__["_past"]], None), _CacheProbe.of_past)


class PackedRows:
    """Computes packed rows: rows of a fixed size that hold tokens of many sequences."""

    def __init__(
        self,
        model: RecordedModel,
        cache: PagedCache,
        *,
        cpu_attention: float = 0.0,
        heads: Collection[HeadShape] = (),
    ) -> None:
        """Make the model call our attention.

        Args:
            model: The model.
            cache: Cache that stores K and V in pages.
            cpu_attention: Share of the decode rows for which the CPU attends while the device computes other rows. Ignored if
                the device has no memory of its own.
            heads: Heads of all attention calls, as `heads` has them once a row was computed: one kernel serves for all of them
                or for none. Empty: they are not known yet, and the kernel is tried for the heads of each call.

        Raises:
            UnsupportedModel: If the model's forward takes no ``position_ids``.
        """
        if not model.takes("position_ids"):
            raise UnsupportedModel("its forward takes no position_ids, so sequences cannot share a row")
        self.model, self._cache = model, cache
        self._cpu_share = cpu_attention if cache.device.own_memory and not cache.format.flexgen else 0.0
        if self._cpu_share:
            cache.keep_means_on_host()
        self._decode, self._host = DecodeAttention(), HostAttention(cache.meter)
        self._kernels: dict[HeadShape, AttendTiles | None] = {shape: _kernel_for(model, cache, shape) for shape in heads}
        """The kernel for each shape of heads; None: attention by hand."""
        if None in self._kernels.values():
            self._kernels = dict.fromkeys(heads)
        self._pages: dict[int, RowPages] = {}
        """Pages of each row of the sweep, by the row's `id`; they keep their rows alive, so that no `id` is used twice."""
        self._running: PackedRecording | None = None
        self._key = CacheKey(0, 0)
        model.use(Implementations(self._register(), register_sliced_experts()))
        self._cache_places = cache_places(model)

    @property
    def kernel(self) -> Kernel:
        """Library of attention on the device."""
        return "torch" if not self._kernels or None in self._kernels.values() else "triton"

    @property
    def heads(self) -> tuple[HeadShape, ...]:
        """Heads of the attention calls, of which every kind was there once a row went through all layers."""
        return tuple(self._kernels)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.model.layers)

    @property
    def can_be_halved(self) -> bool:
        """Whether a sweep may be repeated in smaller rows: always, because K and V are stored again in the same pages."""
        return True

    def reserve(self, sweep: Sweep) -> None:
        """Allocate a sweep's pages; its rows may be recorded afterwards.

        Args:
            sweep: The sweep that will be computed next.
        """
        on_host, maps = host_attended(sweep.rows, self._cpu_share), self._cache.page_maps
        self._pages = {id(row): RowPages(row, maps, host_attends=k in on_host) for k, row in enumerate(sweep.rows)}
        staged: dict[Form, int] = defaultdict(int)
        for pages in self._pages.values():
            for form, found in pages.staged.items():
                staged[form] = max(staged[form], rows_at_once(suspends=bool(on_host)) * len(found.pages))
        self._cache.reserve(sweep.pages, staged)

    def record(self, row: Row) -> PackedRecording:
        """Record how each layer is called for a row of the sweep given to `reserve`, without computing layers."""
        padding = row.size - row.num_tokens
        tokens = [token for segment in row.segments for token in segment.tokens] + [PADDING_TOKEN] * padding
        places = [position for segment in row.segments for position in range(segment.start, segment.end)] + [0] * padding
        ids, positions = upload([tokens, places], self.model.device)
        pages = self._pages[id(row)]
        on_cpu = row.kind == "decode" and (pages.host_attends or self.model.device.type == "cpu")
        in_loops = on_cpu and not self._cache.format.flexgen
        decode, host = self._decode if in_loops else None, self._host if pages.host_attends else None
        attention = RowAttention(pages, self._cache, self.model.device, decode, host)
        recording = PackedRecording(positions=positions, attention=attention)
        self.model.record(
            recording,
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=torch.ones_like(ids)[None],
            use_cache=False,
        )
        probe = _CacheProbe(positions)
        calls = zip(recording.calls, self._cache_places, strict=True)
        recording.calls = [call.with_value(places, probe) for call, places in calls]
        return recording

    def load_cache(self, j: int, recording: PackedRecording) -> Transfer | None:
        """Start to load the pages of layer j that attention cannot read where they are stored; the layer waits for them."""
        return recording.attention.load(j)

    def store_cache(self, j: int, recording: PackedRecording) -> Transfer | None:
        """Start to write back the loaded pages that layer j changed; must follow every replay."""
        return recording.attention.store(j)

    def replay(self, j: int, recording: PackedRecording) -> None:
        """Run layer j on a row.

        Raises:
            UnsupportedModel: If the layer does not call transformers' attention interface, or calls it in an unknown way.
        """
        self._running, self._key = recording, CacheKey(j, 0)
        try:
            self.model.replay(j, recording)
        finally:
            self._running = None
        if self._key.call == 0:
            raise UnsupportedModel(
                f"layer {j} ({type(self.model.layers[j]).__name__}) does not call transformers' attention interface"
            )

    def use_suspender(self, suspend: Callable[[], None]) -> None:
        """Set the function that suspends a layer call while the CPU attends for it."""
        self._host.suspend = suspend

    def bad_tokens(self, recording: PackedRecording) -> Tensor:
        """Return which tokens ``[T]`` had K or V that was not finite; their pages hold zeros instead."""
        return recording.attention.bad

    def close(self) -> None:
        """Remove the cache's file on disk and end the threads that run in parallel with the computation."""
        self._host.close()
        self._decode.close()
        self._cache.close()

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[P, vocab]`` for hidden states ``[P, ...]`` of the last layer."""
        return self.model.finish(hidden)

    def _register(self) -> str:
        # The registries of transformers live as long as the process; the model must not.
        owner, name = weakref.ref(self), f"flexgen_helm_{next(_names)}"

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
            rows = owner()
            assert rows is not None
            return rows._attend(query, key, value, attention_mask, **kwargs), None

        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, _mask_rule)
        return name

    def _attend(  # noqa: PLR0913 - transformers' signature
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend as transformers' interface asks: ``[1, H, T, D]`` in, ``[1, T, H, Dv]`` out."""
        unknown = sorted(n for n, v in kwargs.items() if v is not None and v is not False and n not in HARMLESS_ARGUMENTS)
        if unknown:
            raise UnsupportedModel(f"it calls attention with unsupported arguments: {', '.join(unknown)}")
        if not isinstance(attention_mask, MaskRule):
            raise UnsupportedModel(f"it calls attention with its own mask ({type(attention_mask).__name__})")
        recording = self._running
        assert recording is not None
        sizes = {x.shape[2] for x in (query, key, value)} | {len(recording.positions)}
        if len(sizes) != 1:
            raise UnsupportedModel(f"it calls attention with {key.shape[2]} keys for the {query.shape[2]} queries of a row")
        current, shape = self._key, HeadShape(query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        if shape not in self._kernels:
            self._kernels[shape] = _kernel_for(self.model, self._cache, shape)
        recording.attention.attend_tiles = self._kernels[shape]
        qkv = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = recording.attention.attend(current, qkv, attention_mask, scale=scale, softcap=softcap, sinks=s_aux)[None]
        # While this call was suspended, that of another row ran.
        self._running, self._key = recording, current._replace(call=current.call + 1)
        return output


def _kernel_for(model: RecordedModel, cache: PagedCache, shape: HeadShape) -> AttendTiles | None:
    """Return the kernel that reads pages in place, where it serves the heads of an attention call."""
    if model.device.type != "cuda":
        return None
    dtype = cache.cast(torch.empty(0, dtype=model.model.dtype)).dtype
    return trial.paged_kernel(model.device, shape, cache.format, dtype)


def _mask_rule(*args: Any, mask_function: Callable[..., Any] = causal_mask_function, **kwargs: Any) -> MaskRule:
    """Return the model's own predicate as the mask, where transformers' interface expects a tensor."""

    def allowed(q: Tensor, k: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.long, device=q.device)
        result: Tensor = mask_function(zero, zero, q, k)
        return result.expand(q.shape[0], k.shape[1])

    return MaskRule(allowed, mask_function is causal_mask_function)
