"""The cache's argument is found whatever it is called, annotated or not, and nothing else is taken for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from flexgen_helm import UnsupportedModel
from flexgen_helm.model.cache_argument import cache_parameter, cache_places
from flexgen_helm.model.recorder import LayerCall, RecordedModel
from flexgen_helm.rows.packed_check import check_packed
from flexgen_helm.rows.single_check import check_single
from tests.dimensions import MAX_LENGTH, VOCAB_SIZE
from tests.workbench import POLICY

NUM_LAYERS = 2


class _Layer(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _Decoder(PreTrainedModel):
    """Embeds tokens and hands them to two layers, in whatever way a subclass does."""

    config_class = LlamaConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer() for _ in range(NUM_LAYERS))
        self.post_init()

    def run(self, ids: Tensor, *args: Any, **kwargs: Any) -> CausalLMOutput:
        hidden = self.embed_tokens(ids)
        for layer in self.layers:
            hidden = layer(hidden, *args, **kwargs)
        return CausalLMOutput(logits=hidden)


class _Renamed(_Decoder):
    """Nothing tells of a cache: neither a name nor an annotation. What comes before it is handed on, too."""

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Any = None,
        labels: Any = None,
        memory: tuple[Tensor, ...] | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        if use_cache and memory is None:
            memory = DynamicCache()  # type: ignore[assignment]
        return self.run(input_ids, encoder_hidden_states, use_cache, remembered=memory, wanted=use_cache)


class _Positional(_Decoder):
    """Layers take the cache by position, and one parameter before it cannot be anything but a tensor."""

    def forward(
        self, input_ids: Tensor, scale: Tensor | None = None, kept: Any = None, use_cache: bool = False
    ) -> CausalLMOutput:
        kept = DynamicCache() if use_cache and kept is None else kept
        return self.run(input_ids if scale is None else input_ids * scale.long(), None, kept)


class _Misleading(_Decoder):
    """What is called cache, and annotated so, is something else."""

    def forward(
        self, input_ids: Tensor, cache: DynamicCache | None = None, past: Any = None, use_cache: bool = False
    ) -> CausalLMOutput:
        past = DynamicCache() if use_cache and past is None else past
        return self.run(input_ids, cache=past, past_key_values=cache)


class _Copying(_Decoder):
    """A cache that is given does not arrive: a prompt could not be continued."""

    def forward(self, input_ids: Tensor, cache: DynamicCache | None = None, use_cache: bool = False) -> CausalLMOutput:
        return self.run(input_ids, cache=DynamicCache())


class _Without(_Decoder):
    """No cache at all, though an argument has its name."""

    def forward(self, input_ids: Tensor, cache: Any = None, past_key_values: Any = None) -> CausalLMOutput:
        return self.run(input_ids, cache=cache, past_key_values=past_key_values)


def recorded(kind: type[_Decoder]) -> RecordedModel:
    config = LlamaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=NUM_LAYERS, num_attention_heads=2)
    return RecordedModel(kind(config))


@pytest.mark.parametrize(
    ("kind", "parameter", "place"),
    [(_Renamed, "memory", "remembered"), (_Positional, "kept", 1), (_Misleading, "past", "cache")],
)
def test_cache_is_followed_whatever_its_name(kind: type[_Decoder], parameter: str, place: str | int) -> None:
    model = recorded(kind)
    assert cache_parameter(model) == parameter
    assert cache_places(model) == [{place}] * NUM_LAYERS


@pytest.mark.parametrize("kind", [_Copying, _Without])
def test_model_to_which_no_cache_can_be_given_is_refused(kind: type[_Decoder]) -> None:
    with pytest.raises(UnsupportedModel, match="takes no cache"):
        cache_parameter(recorded(kind))


def test_layers_of_a_model_without_a_cache_are_given_none() -> None:
    assert cache_places(recorded(_Without)) == [frozenset()] * NUM_LAYERS


def test_value_is_put_only_where_the_call_has_the_place() -> None:
    call = LayerCall(False, (None, False), {"remembered": None, "wanted": False})
    changed = call.with_value({"remembered", 0, 7, "absent"}, 3)
    assert changed.items() == [(0, 3), (1, False), ("remembered", 3), ("wanted", False)]


class _Attentive(nn.Module):
    """Attends with a temperature that grows with the position, which it knows only from its cache (as Llama 4 does)."""

    is_causal, num_key_value_groups = True, 1

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.heads = config, layer_idx, config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden: Tensor, allowed: Any, remembered: Any = None) -> Tensor:
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        past = 0
        if remembered is not None:
            past = remembered.get_seq_length(self.layer_idx)
            key, value = remembered.update(key, value, self.layer_idx)
        positions = torch.arange(query.shape[2]) + past
        query = query * (1 + positions[:, None] / 8)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, query, key, value, allowed, scaling=query.shape[-1] ** -0.5, dropout=0.0)
        added: Tensor = hidden + output.flatten(-2)
        return added


class _NextRelease(PreTrainedModel, GenerationMixin):
    """A whole language model whose cache is called something else in every signature."""

    config_class = LlamaConfig
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Attentive(config, j) for j in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        memory: Any = None,
        use_cache: bool = True,
    ) -> CausalLMOutput:
        memory = DynamicCache(config=self.config) if use_cache and memory is None else memory
        hidden = self.embed_tokens(input_ids)
        allowed = create_causal_mask(self.config, hidden, attention_mask, memory, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, allowed, remembered=memory)
        return CausalLMOutput(logits=self.lm_head(hidden))


def next_release() -> RecordedModel:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=MAX_LENGTH
    )
    model = _NextRelease(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return RecordedModel(model)


@pytest.mark.parametrize("check", [check_packed, check_single])
def test_model_of_another_release_equals_its_own_forward(check: Any) -> None:
    """The check compares what is cut and continued with the model's forward of the whole."""
    assert check(next_release(), POLICY, max_length=MAX_LENGTH).worst_difference < 1e-4


@pytest.mark.parametrize(("check", "kind"), [(check_packed, "packed"), (check_single, "single")])
def test_that_model_needs_its_cache(check: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the argument were missed, the check would notice."""
    monkeypatch.setattr(f"flexgen_helm.rows.{kind}.cache_{'places' if kind == 'packed' else 'parameter'}", missed(kind))
    with pytest.raises(UnsupportedModel, match="differ"):
        check(next_release(), POLICY, max_length=MAX_LENGTH)


def missed(kind: str) -> Any:
    return (lambda model: [frozenset()] * NUM_LAYERS) if kind == "packed" else (lambda model: "past_key_values")
