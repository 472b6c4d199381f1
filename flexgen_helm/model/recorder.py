"""Call the layers of a transformers model one at a time, without changing its code: record, replay, finish.

The model's own forward runs, but each entry of its decoder's layer list is replaced by a stand-in that notes how its layer is
called. The layers themselves are called later, in the order that a schedule gives. See docs/architecture.md.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.machine.matmul import Matmul, faster_matmul
from flexgen_helm.model.compiled.layers import CompiledLayers
from flexgen_helm.model.layers import FirstLayers, layer_kinds, layers_path
from flexgen_helm.model.linear import pack_weights, use_matmul

ArgumentKey = int | str
"""Identifies an argument of a layer: its position after the hidden state (from 0), or its keyword."""


class LayerCall(NamedTuple):
    """The arguments with which the model called a layer, without the hidden state."""

    named: bool
    """Whether the hidden state was passed by keyword, as ``hidden_states=``."""
    args: tuple[Any, ...]
    """Positional arguments after the hidden state."""
    kwargs: dict[str, Any]
    """Keyword arguments other than ``hidden_states``."""

    def items(self) -> list[tuple[ArgumentKey, Any]]:
        """Return every argument with its place."""
        return [*enumerate(self.args), *self.kwargs.items()]

    @property
    def takes_outputs(self) -> bool:
        """Whether it passes extra outputs of the layer before it."""
        return any(isinstance(value, _ExtraOutput) for _, value in self.items())

    def with_value(self, places: Collection[ArgumentKey], value: Any) -> LayerCall:
        """Return a copy of the call that passes ``value`` at each of ``places``; places that the call lacks are ignored."""
        return self._mapped(lambda place, own: value if place in places else own)

    def with_outputs(self, extra: tuple[Any, ...]) -> LayerCall:
        """Return a copy of the call that passes the extra outputs of the layer before it, where it passes any."""
        return self._mapped(lambda _, own: extra[own.place - 1] if isinstance(own, _ExtraOutput) else own)

    def with_hidden(self, hidden: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return all arguments, the hidden state among them."""
        if self.named:
            return self.args, {"hidden_states": hidden, **self.kwargs}
        return (hidden, *self.args), self.kwargs

    def _mapped(self, change: Callable[[ArgumentKey, Any], Any]) -> LayerCall:
        args = tuple(change(place, own) for place, own in enumerate(self.args))
        return self._replace(args=args, kwargs={name: change(name, own) for name, own in self.kwargs.items()})


class Implementations(NamedTuple):
    """The attention function and the experts function of a model, by their names in transformers' registries."""

    attention: str
    """Name in `AttentionInterface`, such as "eager"."""
    experts: str
    """Name in the registry of functions for mixtures of experts, such as "eager"."""


EAGER = Implementations("eager", "eager")
"""transformers' reference implementations, written in plain torch operations."""


@dataclass
class Recording:
    """The state of one row of T tokens between record and finish: its layer calls and its current hidden state."""

    hidden_moves: ClassVar[bool] = True
    calls: list[LayerCall] = field(default_factory=list)
    """One call for each layer, in their order."""
    hidden: Tensor | None = None
    """``[1, T, hidden]``, or ``[streams, 1, T, hidden]`` for models with several residual streams. None before recording."""
    extra_outputs: tuple[Any, ...] = ()
    """Outputs of the last replayed layer other than the hidden state; some models pass them to the next layer."""

    @property
    def tokens(self) -> Tensor:
        """The hidden state with the token axis first, ``[T, ...]``, as `RecordedModel.finish` takes it."""
        assert self.hidden is not None
        return self.hidden.movedim(1 if self.hidden.shape[0] == 1 else 2, 0)


AnyRecording = TypeVar("AnyRecording", bound=Recording)


class _Recorded(Exception):
    """Ends the model's forward at the last stand-in."""


class _ExtraOutput(NamedTuple):
    """Stands for an extra output of a layer during recording, until replay has the value."""

    place: int
    """Index in the tuple that the layer returns; the hidden state is at 0."""


class _Placeholder(Tensor):
    """Stands for the output of a layer: a hidden state, or a tuple that begins with one. It is NaN, so that any use shows."""

    @staticmethod
    def like(hidden: Tensor) -> Tensor:
        """Return a placeholder of the shape of ``hidden`` that takes no memory."""
        nan = torch.full((1,) * hidden.dim(), float("nan"), dtype=hidden.dtype, device=hidden.device)
        return nan.expand(hidden.shape).as_subclass(_Placeholder)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            return super().__getitem__(index)
        return self if index == 0 else _ExtraOutput(index)

    def __iter__(self) -> Iterator[Any]:
        return iter((self, _ExtraOutput(1)))


class _StandIn(nn.Module):
    """Takes the place of a layer in the model's list, with the attributes of that layer."""

    def __init__(self, owner: RecordedModel, j: int, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(_owner=weakref.proxy(owner), _j=j, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tell the owner how the layer is called."""
        return self._owner._visit(self._j, args, kwargs)


class RecordedModel:
    """A causal language model whose layers are called one at a time. It must not be used by two threads at once."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        own: Implementations | None = None,
        device: torch.device | None = None,
        compiled: CompiledLayers | None = None,
    ) -> None:
        """Find the layers and put stand-ins in their place.

        Args:
            model: The model. Its layer list is replaced; use `plain` to run the unmodified model.
            own: The implementations that transformers chose for the model. None reads them from its config, which is right
                unless they have been changed since it was made.
            device: The device that computes. None means the device of the model's first parameter.
            compiled: Compiles layers, of other models with layers of the same kinds too. None: layers run as they are.

        Raises:
            UnsupportedModel: If the model has no list of decoder layers.
        """
        self.model = model
        self.device: torch.device = model.device if device is None else device
        """The device that computes."""
        config = model.config
        chosen = Implementations(config._attn_implementation or "eager", config._experts_implementation or "eager")
        self.own: Implementations = chosen if own is None else own
        """The implementations that transformers chose for this model."""
        self.matmul: Matmul = faster_matmul(self.device, model.dtype)
        """Library of the products of linear layers and experts."""
        self._in_use = self.own
        self._path = layers_path(model)
        self._stack = model.get_submodule(self._path)
        self._modules = list(model.modules())
        self.layers: list[nn.Module] = list(self._stack.children())
        self.compiled = compiled
        """Compiles layers; None: they run as they are."""
        self._kinds = [] if compiled is None else layer_kinds(model, self.layers)
        self._stand_ins = nn.ModuleList([_StandIn(self, j, layer) for j, layer in enumerate(self.layers)])
        self._parameters = frozenset(inspect.signature(model.forward).parameters)
        self._recording: Recording | None = None
        self._final: Tensor | None = None
        self._returns_tuple = False
        self.use(self.own)

    def takes(self, name: str) -> bool:
        """Whether the model's forward has a parameter of this name."""
        return name in self._parameters

    def use(self, implementations: Implementations) -> None:
        """Set the attention and experts functions with which layers are recorded and replayed."""
        self._in_use = implementations
        self._install(self._stand_ins, implementations, self.matmul)

    def pack_weights(self, num_tokens: tuple[int, ...]) -> None:
        """Pack weights for the library of the products, which changes no bit; `plain` keeps them packed afterwards.

        Args:
            num_tokens: Numbers of tokens in a row.
        """
        pack_weights(self._modules, num_tokens)

    def record(self, recording: AnyRecording, **inputs: Any) -> AnyRecording:
        """Run the model's forward without its layers and note how it calls each of them.

        Args:
            recording: A new recording. It is filled and returned.
            inputs: Arguments for the model's forward; those that it does not take are left out.

        Raises:
            UnsupportedModel: If the forward does not call each layer exactly once.
        """
        self._recording = recording
        try:
            with suppress(_Recorded):
                self._forward(**inputs)
        finally:
            self._recording = None
        if len(recording.calls) != len(self.layers):
            raise UnsupportedModel(f"its forward calls {len(recording.calls)} of {len(self.layers)} layers in one pass")
        return recording

    def replay(self, j: int, recording: Recording) -> None:
        """Run layer j on a recorded row; `Recording.hidden` and `Recording.extra_outputs` become the outputs of the layer."""
        args, kwargs = recording.calls[j].with_outputs(recording.extra_outputs).with_hidden(recording.hidden)
        if self.compiled is None:
            output = self.layers[j](*args, **kwargs)
        else:
            output = self.compiled.call(self.layers[j], self._kinds[j], self._in_use.attention, args, kwargs)
        self._returns_tuple = isinstance(output, tuple | list)
        recording.hidden, *others = output if self._returns_tuple else (output,)
        recording.extra_outputs = tuple(others)

    def finish(self, hidden: Tensor) -> Tensor:
        """Apply the final norm and the head to hidden states of the last layer.

        Args:
            hidden: ``[P, ...]`` for P positions, in the layout of `Recording.tokens`.

        Returns:
            Logits ``[P, vocab]``.
        """
        ids = torch.ones(1, len(hidden), dtype=torch.long, device=self.device)
        self._final = hidden.movedim(0, 1 if hidden.shape[1] == 1 else 2)
        try:
            output = self._forward(
                input_ids=ids,
                position_ids=torch.zeros_like(ids),
                # Given a mask of ones, transformers does not look for packed sequences in the position ids.
                attention_mask=torch.ones_like(ids),
                use_cache=False,
            )
        finally:
            self._final = None
        logits: Tensor = output.logits[0]
        return logits

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """Yield the model with its own layer list, products and eager implementations; stand-ins return afterwards."""
        self._install(self._stack, EAGER, "torch")
        try:
            yield self.model
        finally:
            self.use(self._in_use)

    @contextmanager
    def shortened(self, count: int) -> Iterator[PreTrainedModel]:
        """Yield the model as `plain` does, but with its first ``count`` layers only. Its config still counts all layers."""
        with self.plain():
            self.model.set_submodule(self._path, FirstLayers(self.layers[:count]))
            yield self.model

    def _forward(self, **inputs: Any) -> Any:
        ids: Tensor = inputs["input_ids"]
        inputs["logits_to_keep"] = torch.arange(ids.shape[1], device=ids.device)
        return self.model(**{name: value for name, value in inputs.items() if self.takes(name)})

    def _install(self, layers: nn.Module, implementations: Implementations, matmul: Matmul) -> None:
        self.model.set_submodule(self._path, layers)
        use_matmul(self._modules, matmul)
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # a model type whose attention cannot be set warns every time
        try:
            self.model.set_attn_implementation(implementations.attention)
            self.model.set_experts_implementation(implementations.experts)
        finally:
            transformers_logging.set_verbosity(verbosity)

    def _visit(self, j: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = "hidden_states" in kwargs
        hidden = kwargs["hidden_states"] if named else args[0]
        last = j == len(self.layers) - 1
        if self._final is not None:
            return _Placeholder.like(hidden) if not last else (self._final, None) if self._returns_tuple else self._final
        recording = self._recording
        assert recording is not None
        if j == 0:
            recording.hidden = hidden
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        recording.calls.append(LayerCall(named, args if named else args[1:], others))
        if last:
            raise _Recorded
        return _Placeholder.like(hidden)
