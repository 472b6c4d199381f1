"""How long a job may be, where the library's own model shows that it computes something else beyond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexgen_helm import Engine, Job
from flexgen_helm.errors import InvalidJob
from flexgen_helm.loading.source import open_model
from tests.dimensions import VOCAB_SIZE
from tests.jobs import random_tokens
from tests.models import HALF, SLIDING_AND_FULL, Family, scale_weights
from tests.reference import Agreement, Reference
from tests.workbench import POLICY

LIMIT = 40
LONG = 4 * LIMIT
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": HALF,
    "original_max_position_embeddings": LIMIT,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 8}


def rotary(config: str, parameters: dict[str, Any], context: int, **fields: Any) -> Family:
    return Family(config, {"rope_parameters": parameters, "max_position_embeddings": context, **fields})


def by_layer_type(sliding: dict[str, Any], full: dict[str, Any], context: int) -> Family:
    parameters = {"sliding_attention": sliding, "full_attention": full}
    fields = {"num_hidden_layers": 4, "head_dim": 16, "layer_types": SLIDING_AND_FULL, "sliding_window": LONG}
    return rotary("Gemma3TextConfig", parameters, context, query_pre_attn_scalar=16, **fields)


GROWING = {
    "dynamic": rotary("LlamaConfig", DYNAMIC, LIMIT),
    "dynamic with an original length": rotary("LlamaConfig", DYNAMIC | {"original_max_position_embeddings": 8}, LIMIT),
    "dynamic, old name": Family(
        "LlamaConfig", {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": LIMIT}
    ),
    "longrope": rotary("Phi3Config", LONGROPE, LONG, original_max_position_embeddings=LIMIT),
    "longrope in Llama": rotary("LlamaConfig", LONGROPE, LONG),
    "one kind of layer longrope": by_layer_type(DEFAULT, LONGROPE, LONG),
    "one kind of layer dynamic": by_layer_type(DEFAULT, DYNAMIC, LIMIT),
    "the other kind with a shorter original length": by_layer_type(YARN, LONGROPE, LONG),
}
"""Models whose rotary embeddings change when a sequence grows beyond ``LIMIT`` tokens."""


def save(family: Family, folder: Path) -> Path:
    torch.manual_seed(13)
    model: Any = AutoModelForCausalLM.from_config(family.build()).eval()
    scale_weights(model)
    model.config.eos_token_id = model.generation_config.eos_token_id = VOCAB_SIZE - 1
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def first_logits(folder: Path, length: int) -> torch.Tensor:
    """Returns what the library's model, freshly loaded, says about the first five tokens of a sequence."""
    ids = torch.tensor([random_tokens(17, LONG)[:length]])
    logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits[0, :5]
    return logits


@pytest.mark.parametrize("kind", GROWING)
def test_context_ends_where_rotary_embeddings_change(tmp_path: Path, kind: str) -> None:
    folder = save(GROWING[kind], tmp_path)
    short = first_logits(folder, 5)
    assert (first_logits(folder, LIMIT) - short).abs().max() < 1e-4
    assert (first_logits(folder, LIMIT + 1) - short).abs().max() > 1e-3
    loaded = open_model(str(folder), dtype="float32", device=torch.device("cpu")).load()
    assert loaded.max_length == LIMIT
    assert "original length" in loaded.length_reason
    assert ("dynamic" if "dynamic" in kind else "longrope") in loaded.length_reason


@pytest.mark.parametrize("kind", ["dynamic", "one kind of layer longrope"])
def test_jobs_within_the_original_length_are_served_and_longer_ones_named(tmp_path: Path, kind: str) -> None:
    folder = save(GROWING[kind], tmp_path)
    lengths = [(1, 5), (9, 8), (LIMIT - 5, 5), (LIMIT, 0)]
    jobs = [
        Job(token_ids=random_tokens(n, n), max_new_tokens=new, score_prompt=True, top_logprobs=10 if new else 0)
        for n, new in lengths
    ]
    agreement, reference = Agreement(), Reference(folder)
    with Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY) as engine:
        for job, result in zip(jobs, engine.run(jobs), strict=True):
            agreement.add(job, result, reference)
        for length, new in ((LIMIT - 2, 3), (LIMIT + 1, 1)):
            with pytest.raises(InvalidJob, match=rf"\b{LIMIT}\b.*original length"):
                engine.run([Job(token_ids=random_tokens(3, length), max_new_tokens=new)])
    assert not agreement.failures, agreement.failures


@pytest.mark.parametrize(
    ("parameters", "kind"),
    [
        (DEFAULT, "LlamaConfig"),
        (YARN, "LlamaConfig"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "LlamaConfig"),
    ],
)
def test_context_of_rotary_embeddings_that_stay_the_same(tmp_path: Path, parameters: dict[str, Any], kind: str) -> None:
    folder = save(rotary(kind, parameters, LONG), tmp_path)
    assert (first_logits(folder, LONG) - first_logits(folder, 5)).abs().max() < 1e-4
    loaded = open_model(str(folder), dtype="float32", device=torch.device("cpu")).load()
    assert (loaded.max_length, loaded.length_reason) == (LONG, "its config's max_position_embeddings")


WHISPER: dict[str, Any] = {
    "is_encoder_decoder": False,
    "vocab_size": VOCAB_SIZE,
    "d_model": 64,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 2),
}
LEARNED = {
    "opt": (Family("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": LIMIT}), LIMIT),
    "biogpt": (Family("BioGptConfig", {"max_position_embeddings": LIMIT}), LIMIT),
    "roberta": (Family("RobertaConfig", {"max_position_embeddings": LIMIT, "is_decoder": True, "pad_token_id": 1}), LIMIT - 2),
    "camembert": (
        Family("CamembertConfig", {"max_position_embeddings": LIMIT, "is_decoder": True, "pad_token_id": 2}),
        LIMIT - 3,
    ),
    "whisper": (Family("WhisperConfig", {**WHISPER, "max_target_positions": LIMIT}, base={}), LIMIT),
}
"""Models with a table of positions, and how many tokens it really holds."""


@pytest.mark.parametrize("kind", LEARNED)
def test_context_is_what_the_table_of_positions_holds(tmp_path: Path, kind: str) -> None:
    family, limit = LEARNED[kind]
    folder = save(family, tmp_path)
    loaded = open_model(str(folder), dtype="float32", device=torch.device("cpu")).load()
    assert loaded.max_length == limit
    ids = torch.tensor([random_tokens(5, limit + 1)])
    assert loaded.model(input_ids=ids[:, :limit]).logits.shape[1] == limit
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        loaded.model(input_ids=ids)


@pytest.mark.parametrize(("name", "kind"), [("max_seq_len", "MptConfig"), ("seq_length", "BloomConfig"), ("", "MambaConfig")])
def test_other_names_of_the_context(tmp_path: Path, name: str, kind: str) -> None:
    fields = {
        "hidden_size": 64,
        "vocab_size": VOCAB_SIZE,
        "d_model": 64,
        "n_heads": 4,
        "n_head": 4,
        "n_layers": 2,
        "n_layer": 2,
    }
    folder = save(Family(kind, {**fields, "num_hidden_layers": 2, **({name: LONG} if name else {})}, base={}), tmp_path)
    loaded = open_model(str(folder), dtype="float32", device=torch.device("cpu")).load()
    assert (loaded.max_length, name in loaded.length_reason) == (LONG if name else 2048, True)
    assert "default" in loaded.length_reason or name
