"""Record, replay, finish: a library model cut into its layers, unmodified (docs/architecture.md).

`transformers` runs its own forward. Each entry of the decoder's layer list is a stand-in, which notes how its layer is called;
the layers themselves are called later, in whatever order a schedule says.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import causal_mask_function

from flexgen_helm.attention.plan import MaskRule
from flexgen_helm.attention.row import RowAttention
from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.memory.cache import CacheKey
from flexgen_helm.runtime.experts import EXPERTS_NAME, sliced_experts

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params")
HARMLESS_ARGUMENTS = frozenset(
    (
        *("dropout", "sliding_window", "position_ids", "position_embeddings", "cache_position", "use_cache", "is_causal"),
        *("output_attentions", "output_hidden_states", "return_dict", "logits_to_keep"),
    )
)
"""Arguments of an attention function that change nothing beside what our mask, positions and scale already say."""
_names = itertools.count()


class LayerCall(NamedTuple):
    """How the model called a layer, apart from the hidden state."""

    named: bool
    """Whether the hidden state came as ``hidden_states=``."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Recording:
    """A row between record and finish: its layer calls and its hidden state ``[1, T, hidden]``."""

    positions: Tensor
    attention: RowAttention
    calls: list[LayerCall] = field(default_factory=list)
    hidden: Tensor | None = None


class _Recorded(Exception):
    """Ends a forward at the last stand-in."""


class _StandIn(nn.Module):
    """Takes a layer's place in the model's list. Attributes are the layer's."""

    def __init__(self, owner: RecordedModel, j: int, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(_owner=weakref.proxy(owner), _j=j, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner._visit(self._j, args, kwargs)


class _CacheProbe:
    """Stands in for the cache at replay: K and V pass through, the past length of every token is right, all else is refused."""

    def __init__(self, positions: Tensor) -> None:
        self.__dict__["_past"] = positions - torch.arange(len(positions), device=positions.device)

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return k, v

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Tensor:
        past: Tensor = self.__dict__["_past"]
        return past

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedModel(f"a layer keeps state beside attention: it asks the cache for '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnsupportedModel(f"a layer keeps state beside attention: it writes '{name}' into the cache")


class RecordedModel:
    """A causal language model whose layers are called one at a time. One thread at a time may use it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Find the layers and put stand-ins in their place.

        Raises:
            UnsupportedModel: If there is no list of decoder layers.
        """
        self.model = model
        self._owner, self._leaf, stack = _find_layers(model)
        self._stack = stack
        self.layers: list[nn.Module] = list(stack)
        self._stand_ins = nn.ModuleList([_StandIn(self, j, layer) for j, layer in enumerate(self.layers)])
        parameters = inspect.signature(model.forward).parameters
        if "position_ids" not in parameters:
            raise UnsupportedModel("its forward takes no position_ids, so sequences cannot share a row")
        self._keeps = "logits_to_keep" in parameters
        self._recording: Recording | None = None
        self._final: Tensor | None = None
        self._key = CacheKey(0, 0)
        self._last_output: tuple[Any, ...] | None = None
        self._name = f"flexgen_helm_{next(_names)}"
        self._register()
        self._install(True)

    @property
    def device(self) -> torch.device:
        """Where the matrices are multiplied."""
        return self.model.device

    def record(self, token_ids: list[int], positions: list[int], attention: RowAttention) -> Recording:
        """Run the model up to its layers and note how each would be called."""
        recording = Recording(torch.tensor(positions, device=self.device), attention)
        self._recording, self._final = recording, None
        with suppress(_Recorded):
            self.model(**self._inputs(torch.tensor([token_ids], device=self.device), recording.positions[None]))
        if len(recording.calls) != len(self.layers):
            raise UnsupportedModel(f"its forward visits {len(recording.calls)} of {len(self.layers)} layers, in one pass")
        return recording

    def replay(self, j: int, recording: Recording) -> None:
        """Run layer j on a row; `Recording.hidden` becomes its output."""
        named, args, kwargs = recording.calls[j]
        probe = {name: _CacheProbe(recording.positions) for name in CACHE_ARGUMENTS if name in kwargs and kwargs[name] is None}
        kwargs = {**kwargs, **probe}
        self._recording, self._key = recording, CacheKey(j, 0)
        hidden = recording.hidden
        output = self.layers[j](*args, hidden_states=hidden, **kwargs) if named else self.layers[j](hidden, *args, **kwargs)
        if self._key.call == 0:
            raise UnsupportedModel(
                f"layer {j} ({type(self.layers[j]).__name__}) does its attention, or what it has instead, beside the library's "
                "attention interface"
            )
        self._last_output = output[1:] if isinstance(output, tuple) else None
        recording.hidden = output[0] if isinstance(output, tuple) else output

    def finish(self, hidden: Tensor) -> Tensor:
        """Final norm and head: hidden states ``[P, hidden]`` of the last layer to logits ``[P, vocab]``."""
        ids = torch.ones(1, len(hidden), dtype=torch.long, device=self.device)
        self._final = hidden[None]
        try:
            logits: Tensor = self.model(**self._inputs(ids, torch.zeros_like(ids))).logits[0]
        finally:
            self._final = None
        return logits

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """The model as the library made it, with its own eager attention."""
        self._install(False)
        try:
            yield self.model
        finally:
            self._install(True)

    @contextmanager
    def shortened(self, count: int) -> Iterator[PreTrainedModel]:
        """The model as the library made it, with its first ``count`` layers only."""
        text = self.model.config.get_text_config(decoder=True)
        depth = text.num_hidden_layers
        with self.plain():
            setattr(self._owner, self._leaf, nn.ModuleList(self.layers[:count]))
            text.num_hidden_layers = count
            try:
                yield self.model
            finally:
                text.num_hidden_layers = depth

    def _inputs(self, ids: Tensor, positions: Tensor) -> dict[str, Any]:
        # A mask of ones keeps the library from looking for packed sequences itself.
        inputs = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": torch.ones_like(ids),
            "use_cache": False,
        }
        return {**inputs, "logits_to_keep": torch.arange(ids.shape[1], device=ids.device)} if self._keeps else inputs

    def _install(self, ours: bool) -> None:
        setattr(self._owner, self._leaf, self._stand_ins if ours else self._stack)
        self.model.set_attn_implementation(self._name if ours else "eager")
        self.model.set_experts_implementation(EXPERTS_NAME if ours else "eager")

    def _register(self) -> None:
        # The library's registries live as long as the process; the model must not.
        owner = weakref.ref(self)

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
            model = owner()
            assert model is not None
            return model._attend(query, key, value, attention_mask, **kwargs), None

        AttentionInterface.register(self._name, attend)
        AttentionMaskInterface.register(self._name, _mask_rule)
        ExpertsInterface.register(EXPERTS_NAME, sliced_experts)

    def _visit(self, j: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = "hidden_states" in kwargs
        hidden = kwargs["hidden_states"] if named else args[0]
        last = j == len(self.layers) - 1
        if self._final is not None:
            return hidden if not last else self._final if self._last_output is None else (self._final, *self._last_output)
        recording = self._recording
        assert recording is not None
        if j == 0:
            recording.hidden = hidden
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        recording.calls.append(LayerCall(named, args if named else args[1:], rest))
        if last:
            raise _Recorded
        # NaN: whatever the model computes from it between layers would show.
        return torch.full((1,), float("nan"), dtype=hidden.dtype, device=hidden.device).expand(hidden.shape)

    def _attend(
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
        """The attention function of the library's interface: ``[1, H, T, D]`` in, ``[1, T, H, Dv]`` out."""
        unknown = sorted(n for n, v in kwargs.items() if v is not None and v is not False and n not in HARMLESS_ARGUMENTS)
        if unknown:
            raise UnsupportedModel(f"its attention is called with arguments that cannot be honoured: {', '.join(unknown)}")
        if not isinstance(attention_mask, MaskRule):
            raise UnsupportedModel(f"its attention is called with a mask of its own ({type(attention_mask).__name__})")
        recording = self._recording
        assert recording is not None
        sizes = {x.shape[2] for x in (query, key, value)} | {len(recording.positions)}
        if len(sizes) != 1:
            raise UnsupportedModel(f"its attention is called with {key.shape[2]} keys for {query.shape[2]} queries")
        current = self._key
        self._key = current._replace(call=current.call + 1)
        qkv = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return recording.attention.attend(current, qkv, attention_mask, scale=scale, softcap=softcap, sinks=s_aux)[None]


def _mask_rule(*args: Any, mask_function: Callable[..., Any] = causal_mask_function, **kwargs: Any) -> MaskRule:
    """The mask function of the library's interface: the model's own predicate instead of a tensor."""

    def allowed(q: Tensor, k: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.long, device=q.device)
        result: Tensor = mask_function(zero, zero, q, k)
        return result.expand(q.shape[0], k.shape[1])

    return MaskRule(allowed, mask_function is causal_mask_function)


def _find_layers(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The decoder's layer list: the module that holds it, its name there, and the list."""
    text = model.config.get_text_config(decoder=True)
    depths = {getattr(text, name, None) for name in ("num_hidden_layers", "num_layers", "n_layer")}
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for root in (decoder, model):
        for module in root.modules() if isinstance(root, nn.Module) else ():
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) in depths:
                    return module, name, child
    raise UnsupportedModel("it has no list of decoder layers of the length that its config names")
