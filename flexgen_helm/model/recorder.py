"""Record, replay, finish: a library model cut into its layers, unmodified (docs/architecture.md).

`transformers` runs its own forward. Each entry of the decoder's layer list is a stand-in, which notes how its layer is called;
the layers themselves are called later, in whatever order a schedule says.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.model.layers import FirstLayers, layers_path

Place = int | str
"""Of an argument of a layer: its position behind the hidden state, or its keyword."""


class LayerCall(NamedTuple):
    """How the model called a layer, apart from the hidden state."""

    named: bool
    """Whether the hidden state came as ``hidden_states=``."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def items(self) -> list[tuple[Place, Any]]:
        """Return every argument with its place."""
        return [*enumerate(self.args), *self.kwargs.items()]

    def with_value(self, places: Collection[Place], value: Any) -> LayerCall:
        """Return the same call with a value at those of the places that it has."""
        args = tuple(value if place in places else own for place, own in enumerate(self.args))
        return self._replace(args=args, kwargs={name: value if name in places else own for name, own in self.kwargs.items()})


class Implementations(NamedTuple):
    """Names in transformers' registries of attention and of experts functions."""

    attention: str
    experts: str


EAGER = Implementations("eager", "eager")


@dataclass
class Recording:
    """A row between record and finish: its layer calls and its hidden state."""

    hidden_moves: ClassVar[bool] = True
    calls: list[LayerCall] = field(default_factory=list)
    hidden: Tensor | None = None
    """``[1, T, ...]``, or ``[streams, 1, T, ...]`` for models with several residual streams."""
    rest: tuple[Any, ...] = ()
    """What else the last replayed layer returned; some models hand it on to the next one."""

    @property
    def tokens(self) -> Tensor:
        """The hidden state with tokens in front: ``[T, ...]``, as `RecordedModel.finish` takes it."""
        assert self.hidden is not None
        return self.hidden.movedim(1 if self.hidden.shape[0] == 1 else 2, 0)


AnyRecording = TypeVar("AnyRecording", bound=Recording)


class _Recorded(Exception):
    """Ends a forward at the last stand-in."""


class _Rest(NamedTuple):
    """Stands for what a layer returns at this place of its tuple."""

    place: int


class _Placeholder(Tensor):
    """Stands for what a layer returns: a hidden state, or a tuple that begins with one. NaN, so that any use of it shows."""

    @staticmethod
    def like(hidden: Tensor) -> Tensor:
        """A placeholder of this shape that takes no memory."""
        nan = torch.full((1,) * hidden.dim(), float("nan"), dtype=hidden.dtype, device=hidden.device)
        return nan.expand(hidden.shape).as_subclass(_Placeholder)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            return super().__getitem__(index)
        return self if index == 0 else _Rest(index)

    def __iter__(self) -> Iterator[Any]:
        return iter((self, _Rest(1)))


class _StandIn(nn.Module):
    """Takes a layer's place in the model's list. Attributes are the layer's."""

    def __init__(self, owner: RecordedModel, j: int, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(_owner=weakref.proxy(owner), _j=j, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner._visit(self._j, args, kwargs)


class RecordedModel:
    """A causal language model whose layers are called one at a time. One thread at a time may use it."""

    def __init__(
        self, model: PreTrainedModel, *, own: Implementations | None = None, device: torch.device | None = None
    ) -> None:
        """Find the layers and put stand-ins in their place.

        Args:
            model: Taken over; see `plain`.
            own: What transformers chose for the model, where that has been changed since.
            device: Where the matrices are multiplied; None: where the model's first parameter is.

        Raises:
            UnsupportedModel: If there is no list of decoder layers.
        """
        self.model = model
        self.device: torch.device = model.device if device is None else device
        """Where the matrices are multiplied."""
        config = model.config
        chosen = Implementations(config._attn_implementation or "eager", config._experts_implementation or "eager")
        self.own: Implementations = chosen if own is None else own
        """What transformers chose for this model."""
        self._in_use = self.own
        self._path = layers_path(model)
        self._stack = model.get_submodule(self._path)
        self.layers: list[nn.Module] = list(self._stack.children())
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
        """Choose the attention and experts functions of recorded and replayed layers."""
        self._in_use = implementations
        self._install(self._stand_ins, implementations)

    def record(self, recording: AnyRecording, **inputs: Any) -> AnyRecording:
        """Run the model up to its layers and note how each would be called.

        Args:
            recording: A new one, which is filled and returned.
            inputs: Of the model's forward; those that it does not take are left out.
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
        """Run layer j on a row; `Recording.hidden` becomes its output."""
        named, args, kwargs = recording.calls[j]
        hidden, rest = recording.hidden, recording.rest
        args = tuple(rest[value.place - 1] if isinstance(value, _Rest) else value for value in args)
        kwargs = {name: rest[value.place - 1] if isinstance(value, _Rest) else value for name, value in kwargs.items()}
        output = self.layers[j](*args, hidden_states=hidden, **kwargs) if named else self.layers[j](hidden, *args, **kwargs)
        self._returns_tuple = isinstance(output, tuple | list)
        recording.hidden, *others = output if self._returns_tuple else (output,)
        recording.rest = tuple(others)

    def finish(self, hidden: Tensor) -> Tensor:
        """Final norm and head: the last layer's hidden states ``[P, ...]``, as `Recording.tokens`, to logits ``[P, vocab]``."""
        ids = torch.ones(1, len(hidden), dtype=torch.long, device=self.device)
        self._final = hidden.movedim(0, 1 if hidden.shape[1] == 1 else 2)
        try:
            output = self._forward(
                input_ids=ids,
                position_ids=torch.zeros_like(ids),
                # A mask of ones keeps transformers from looking for packed sequences itself.
                attention_mask=torch.ones_like(ids),
                use_cache=False,
            )
        finally:
            self._final = None
        logits: Tensor = output.logits[0]
        return logits

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """The model as transformers made it, with its own eager attention."""
        self._install(self._stack, EAGER)
        try:
            yield self.model
        finally:
            self.use(self._in_use)

    @contextmanager
    def shortened(self, count: int) -> Iterator[PreTrainedModel]:
        """The model as transformers made it, with its first ``count`` layers only; its config still names them all."""
        with self.plain():
            self.model.set_submodule(self._path, FirstLayers(self.layers[:count]))
            yield self.model

    def _forward(self, **inputs: Any) -> Any:
        ids: Tensor = inputs["input_ids"]
        inputs["logits_to_keep"] = torch.arange(ids.shape[1], device=ids.device)
        return self.model(**{name: value for name, value in inputs.items() if self.takes(name)})

    def _install(self, layers: nn.Module, implementations: Implementations) -> None:
        self.model.set_submodule(self._path, layers)
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # a family whose attention cannot be set says so every time
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
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        recording.calls.append(LayerCall(named, args if named else args[1:], rest))
        if last:
            raise _Recorded
        return _Placeholder.like(hidden)
