"""Attention of one row: store its K and V in the pages, attend chunk by chunk, merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexgen_helm.attention.calls import ChunkCall, Window, plan_attention
from flexgen_helm.attention.chunks import LocatedPages, attend_call
from flexgen_helm.attention.decode import DecodeAttention, DecodePlan, LayerForms, LayerPages, Scoring
from flexgen_helm.attention.host import HostAttention, row_bytes
from flexgen_helm.attention.kernels import NEG_INF, ChunkOutput, Merged, merge_chunks, normalised
from flexgen_helm.attention.locate import Locate, MeanNumbers
from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.paged.plan import TilePlan, tile_queries
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.attention.sparse import LocatedCall, choose, own_token, read_call, staged_choices
from flexgen_helm.attention.sparse_decode import SparseDecode, SparsePlan
from flexgen_helm.attention.writes import HOST, Stores, Writes
from flexgen_helm.kv_cache.page_format import CacheKey, PageFormat
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, Form
from flexgen_helm.kv_cache.working_set import Loaded
from flexgen_helm.memory.copies import to_device, to_host
from flexgen_helm.memory.link import Transfer
from flexgen_helm.memory.spans.span import Activity

LARGEST_KEY = 2.0**58
"""Keys up to this size leave masked scores finite: products with as large a query, summed over 4,096 elements, do in fp32."""
Attend = Callable[..., ChunkOutput]
"""Attends to a call, which is given with its pages."""
AttendTiles = Callable[..., Tensor]
"""`flexgen_helm.attention.paged.attention.attend_row`, which needs Triton."""
Reading = tuple[Callable[[], Merged], Callable[[], int]]
"""Attends in compiled loops, and says how many bytes of K and V that reads."""
QKV = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values."""


class _Outputs:
    """Outputs of a row's T queries for each of a window's R chunks, in fp32.

    Attributes:
        outputs: ``[R, T, H, Dv]``, zeros where a query does not attend to a chunk.
        lse: ``[R, T, H]``, -inf there.
    """

    def __init__(self, window: Window, q: Tensor, value_dim: int) -> None:
        shape = (window.num_chunks, *q.shape[:2])
        self.outputs = torch.empty(*shape, value_dim, dtype=torch.float32, device=q.device)
        self.lse = torch.full(shape, NEG_INF, dtype=torch.float32, device=q.device)
        self.outputs.flatten(0, 1)[window.absent] = 0.0

    def keep(self, call: ChunkCall, part: ChunkOutput) -> None:
        """Put the outputs of a call in their places."""
        output, lse = part
        if call.dead is not None:
            output.masked_fill_(call.dead[:, None, None], 0.0)
            lse.masked_fill_(call.dead[:, None], NEG_INF)
        self.outputs.flatten(0, 1)[call.outputs] = output.float()
        self.lse.flatten(0, 1)[call.outputs] = lse


class RowAttention:
    """The attention of one row, layer after layer. Its plan is made once for each mask rule."""

    def __init__(
        self,
        pages: RowPages,
        cache: PagedCache,
        device: torch.device,
        decode: DecodeAttention | None = None,
        host: HostAttention | None = None,
        attend_tiles: AttendTiles | None = None,
    ) -> None:
        """Plan nothing yet.

        Args:
            pages: The row and its pages.
            cache: Holds K and V.
            device: The device that computes the row.
            decode: Attends on the CPU, for decode rows. None: the device attends call by call.
            host: Lets it run beside the device. None: the device waits.
            attend_tiles: See the attribute.
        """
        self._pages, self._cache, self._device, self._decode, self._host = pages, cache, device, decode, host
        self.attend_tiles = attend_tiles
        """The kernel that reads pages in place (`flexgen_helm.attention.paged`), for the calls that follow. None: the device
        attends call by call. Rows to which the CPU attends do without it."""
        self._tile_plans: dict[tuple[MaskRule, int], TilePlan] = {}
        self._format = cache.format
        percent = cache.format.sparsity
        self._sparse = None if decode is None or percent is None else SparseDecode(decode, percent)
        reads_on = device if host is None else HOST
        self._writes = Writes(pages, reads_on)
        self._means = None if cache.means is None else MeanNumbers(pages, cache.means, reads_on)
        self._plans: dict[MaskRule, list[Window]] = {}
        self._decode_plans: dict[MaskRule, list[DecodePlan]] = {}
        self._sparse_plans: dict[MaskRule, list[SparsePlan]] = {}
        # A thread of attention beside a device never asks for rows: what it reads of staged pages comes whole.
        self._values_apart = pages.row.kind == "decode" and cache.means is not None and host is None
        """Whether sealed pages come without V, of which only the chosen rows follow."""
        self._staged = [form for form, staged in pages.staged.items() if staged.pages]
        self._loaded: dict[int, dict[Form, Loaded]] = {}
        """The row's staged pages of each layer that was loaded and not stored yet, by form."""
        self.bad = torch.zeros(pages.row.size, dtype=torch.bool, device=device)
        """``[T]``: whether a token's K or V was not finite in a layer so far."""

    def load(self, j: int) -> Transfer | None:
        """Start to bring the row's staged pages of layer j. None: it has none."""
        if not self._staged:
            return None
        if j not in self._loaded:
            staged = self._pages.staged
            self._loaded[j] = {
                form: self._cache.working(form).load(j, staged[form], values=form == "exact" or not self._values_apart)
                for form in self._staged
            }
        return self._loaded[j][self._staged[-1]].arriving  # all forms come over one link, one after the other

    def store(self, j: int) -> Transfer | None:
        """Start to write back the staged pages that layer j wrote. None: nothing is to be written, or nothing was loaded."""
        if self._loaded.pop(j, None) is None:
            return None
        stored = [self._cache.working(form).release(j, self._pages.staged[form]) for form in self._staged]
        return next((transfer for transfer in reversed(stored) if transfer is not None), None)

    def attend(
        self, key: CacheKey, qkv: QKV, rule: MaskRule, *, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Store the row's new K and V of one layer and attend.

        Args:
            key: The attention call.
            qkv: Queries ``[T, H, D]``, keys ``[T, H_kv, D]``, values ``[T, H_kv, Dv]``, positions already encoded.
            rule: The layer's mask. Layers that hold an equal rule share a plan.
            scale: Factor of the scores.
            softcap: See `attend_chunk`.
            sinks: ``[H]`` logits, see `normalised`. None: there are none.

        Returns:
            ``[T, H, Dv]`` in the dtype of the values.
        """
        q, k, v = (self._cache.cast(x) for x in qkv)
        k, v = self._cleaned(k, v)
        stores = self._cache.tensors(key, k, v, self._pages.places)
        locate = self._locate(key)
        if self._decode is not None:
            (q, k, v), sinks = _on_host((q, k, v), sinks)
        self._writes.apply(stores, locate, (k, v))
        if self._decode is None and self.attend_tiles is not None:
            plan = self._tile_plan(rule, q.shape[1] // k.shape[1], q.itemsize)
            forms = self._format.forms(k, v)
            output = self.attend_tiles(plan, q, stores, locate, forms, scale=scale, softcap=softcap, sinks=sinks)
            return output.to(qkv[2].dtype)
        if self._decode is not None:
            with nullcontext() if self._host is None else self._host.holding(row_bytes(q, k, v)):
                merged = self._decoded(key, q, rule, stores, scale=scale, softcap=softcap)
        else:
            merged = self._in_calls(key, q, rule, _Places(stores, locate), scale=scale, softcap=softcap)
            if self._format.flexgen:
                output, lse = own_token((q, k, v), scale=scale, softcap=softcap)
                merged = merge_chunks(merged, output[None], lse[None])
        return to_device(normalised(merged, sinks).to(qkv[2].dtype), qkv[2].device)

    def _tile_plan(self, rule: MaskRule, sharing: int, itemsize: int) -> TilePlan:
        size = tile_queries(self._pages.row.kind, sharing, itemsize)
        if (rule, size) not in self._tile_plans:
            self._tile_plans[rule, size] = TilePlan.of(self._pages, rule, size, self._device)
        return self._tile_plans[rule, size]

    def _in_calls(
        self, key: CacheKey, q: Tensor, rule: MaskRule, places: _Places, *, scale: float, softcap: float | None
    ) -> Merged:
        """Attend on the device, kernel call by kernel call."""
        if rule not in self._plans:
            self._plans[rule] = plan_attention(
                self._pages, rule, dtype=q.dtype, device=self._device, own_token=not self._format.flexgen
            )
        windows = self._plans[rule]
        located = {call: places.of(call) for window in windows for call in window.calls}
        attend: Attend = partial(attend_call, q=q, scale=scale, softcap=softcap)
        if self._format.sparsity is not None:
            attend = self._sparsely(key, located, q, scale=scale, softcap=softcap)
        merged: Merged | None = None
        for window in windows:
            outputs = _Outputs(window, q, _any_format(places.stores).v.dim)
            for call in window.calls:
                outputs.keep(call, attend(call, pages=located[call]))
            merged = merge_chunks(merged, outputs.outputs, outputs.lse)
        assert merged is not None
        return merged

    def _sparsely(
        self, key: CacheKey, located: Mapping[ChunkCall, list[LocatedPages]], q: Tensor, *, scale: float, softcap: float | None
    ) -> Attend:
        """Choose the keys of which V is read; returns what attends to a call with them."""
        percent, flexgen = self._format.sparsity, self._format.flexgen
        assert percent is not None
        sparse = [LocatedCall(call, pages) for call, pages in located.items() if flexgen or call.form == "sealed"]
        chosen = choose(sparse, q, percent, scale=scale, softcap=softcap)
        if self._are_values_missing(key.layer):
            num_pages, num_kv = len(self._pages.staged["sealed"].pages), sparse[0].pages[0].tensors.format.v.num_heads
            self._bring(key, staged_choices([call for call, _ in sparse], chosen, num_pages, num_kv).cpu())

        def attend(call: ChunkCall, pages: list[LocatedPages]) -> ChunkOutput:
            if flexgen or call.form == "sealed":
                return read_call(call, chosen, pages, means=not flexgen)
            return attend_call(call, q, pages, scale=scale, softcap=softcap)

        return attend

    def _decoded(
        self, key: CacheKey, q: Tensor, rule: MaskRule, stores: Stores, *, scale: float, softcap: float | None
    ) -> Merged:
        """Attend on the CPU, in compiled loops, which is where the outcome is."""
        loaded = self._loaded.get(key.layer, {})
        forms = {
            form: LayerPages(x, loaded[form].slots if form in loaded else None, self._means if form == "sealed" else None)
            for form, x in stores.items()
        }
        options: Scoring = {"scale": scale, "softcap": softcap}
        if self._sparse is None:
            work, num_bytes = self._reading_all(q, rule, forms, options)
        else:
            work, num_bytes = self._reading_chosen(key, q, rule, forms, options)
        return work() if self._host is None else self._host.attend(Activity("compute", str(key.layer)), num_bytes(), work)

    def _reading_all(self, q: Tensor, rule: MaskRule, forms: LayerForms, options: Scoring) -> Reading:
        """What reads all of K and V, and what says how many bytes that are."""
        decode = self._decode
        assert decode is not None
        if rule not in self._decode_plans:
            self._decode_plans[rule] = decode.plan(self._pages, rule)
        plans = self._decode_plans[rule]
        return partial(decode.attend, plans, q, forms, **options), lambda: sum(plan.num_bytes(forms) for plan in plans)

    def _reading_chosen(self, key: CacheKey, q: Tensor, rule: MaskRule, forms: LayerForms, options: Scoring) -> Reading:
        """What reads V of chosen keys only, and what says how many bytes that are, about."""
        sparse = self._sparse
        assert sparse is not None
        if rule not in self._sparse_plans:
            self._sparse_plans[rule] = sparse.plan(self._pages, rule)
        plans = self._sparse_plans[rule]

        def work() -> Merged:
            choices = sparse.choose(plans, q, forms, **options)
            if self._are_values_missing(key.layer):
                union = torch.from_numpy(choices.rows_of("staged", len(self._pages.staged["sealed"].pages)).view(np.int32))
                self._bring(key, (union[..., None] >> torch.arange(PAGE_TOKENS, dtype=torch.int32) & 1).bool())
            return sparse.attend(choices, forms)

        return work, lambda: sum(sparse.num_bytes(plan, forms) for plan in plans)

    def _are_values_missing(self, j: int) -> bool:
        """Whether sealed pages of layer j came without V."""
        return self._values_apart and "sealed" in self._loaded.get(j, {})

    def _bring(self, key: CacheKey, wanted: Tensor) -> None:
        """Bring rows of V, bool ``[staged pages, num_heads, 32]``, of sealed pages."""
        loaded, staged = self._loaded[key.layer]["sealed"], self._pages.staged["sealed"]
        self._cache.working("sealed").bring_values(key, staged, loaded, wanted)

    def _cleaned(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V with zeros for tokens that are not finite, which are noted in `bad`.

        Masks do not hide NaN and infinity: a masked score is added to -inf and its value multiplied by 0. So pages hold finite
        numbers only, whoever reads or reuses them, and a sequence with such a token has no answer.
        """
        k_limit, v_limit = min(LARGEST_KEY, torch.finfo(k.dtype).max), torch.finfo(v.dtype).max
        # To look costs a GPU its head start, to copy costs a CPU more than the look.
        if k.device.type == "cpu" and _largest(k) <= k_limit and _largest(v) <= v_limit:
            return k, v
        good = k.abs().amax((1, 2)) <= k_limit
        good &= v.abs().amax((1, 2)) <= v_limit
        self.bad |= ~good
        kept = good[:, None, None]
        return torch.where(kept, k, 0.0), torch.where(kept, v, 0.0)

    def _locate(self, key: CacheKey) -> Locate:
        """Wait for the row's staged pages of a layer."""
        if not self._staged:
            return Locate({}, self._means)
        self.load(key.layer)
        loaded = self._loaded[key.layer]
        for form, pages in loaded.items():
            working = self._cache.working(form)
            working.wait(pages)
            if pages.is_partial and not self._values_apart:
                working.bring_values(key, self._pages.staged[form], pages)
        return Locate({form: pages.slots for form, pages in loaded.items()}, self._means)


class _Places(NamedTuple):
    """The pages of a layer, and where the row's are among them."""

    stores: Stores
    locate: Locate

    def of(self, call: ChunkCall) -> list[LocatedPages]:
        """The pages of a call."""
        tensors, means = self.stores[call.form], self.locate.means if call.form == "sealed" else None
        return [
            LocatedPages(
                tensors[pages.place],
                self.locate.pages(call.form, pages.place, pages.numbers),
                pages.which,
                None if means is None else means(pages.place, pages.numbers),
            )
            for pages in call.pages
        ]


def _any_format(stores: Stores) -> PageFormat:
    """The form of exact pages, which every row has."""
    return next(iter(stores["exact"].values())).format


def _on_host(qkv: QKV, sinks: Tensor | None) -> tuple[QKV, Tensor | None]:
    """Bring what attention on the CPU reads, with one wait."""
    q, k, v, *others = to_host([*qkv, *([] if sinks is None else [sinks])])
    return (q, k, v), others[0] if others else None


def _largest(x: Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    low, high = torch.aminmax(x)
    return max(-float(low), float(high))
