"""Documents longer than the context: HELM's own metrics equal those of plain ``transformers`` forwards, token for token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helm.benchmark.adaptation.adapter_spec import ADAPT_LANGUAGE_MODELING, AdapterSpec
from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner
from helm.benchmark.scenarios.scenario import TEST_SPLIT, Input, Instance, Scenario, ScenarioSpec
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import flexgen_helm.plugin  # noqa: F401  registers the generators of deployments
from flexgen_helm.generation.prepare import prepare
from flexgen_helm.helm.runner import FlexGenRunner
from flexgen_helm.types import Job
from tests.dimensions import VOCAB_SIZE
from tests.helm.conftest import RunSuite
from tests.helm.files import read
from tests.models import save_tiny
from tests.reference import PROMPT_TOLERANCE, Reference
from tests.text_models import save_llama
from tests.tiny_tokenizers import byte_level, metaspace_bpe
from tests.tokenizers import PAIRS, SPECIAL, save_pair_tokenizer

pytestmark = pytest.mark.usefixtures("close_engine")
CONTEXT = 40
LETTERS = "".join(PAIRS[(7 * number * number + number) % len(PAIRS)] for number in range(150))
"""150 tokens of two letters, in any of which a text may be cut."""


class DocumentsScenario(Scenario):
    """Documents, one test instance each."""

    name = "documents"
    description = "Documents"
    tags: ClassVar[list[str]] = []  # type: ignore[misc]

    def __init__(self, documents: list[str]) -> None:
        super().__init__()
        self._documents = documents

    def get_instances(self, output_path: str) -> list[Instance]:
        return [Instance(Input(text=text), references=[], split=TEST_SPLIT) for text in self._documents]


def perplexity_spec(folder: Path, documents: list[str]) -> RunSpec:
    """As HELM's run specs of the_pile and wikitext_103."""
    return RunSpec(
        name="documents",
        scenario_spec=ScenarioSpec("tests.helm.test_language_modeling.DocumentsScenario", args={"documents": documents}),
        adapter_spec=AdapterSpec(
            method=ADAPT_LANGUAGE_MODELING,
            model="/".join(folder.parts[-2:]),
            model_deployment=f"flexgen/{folder}",
            max_train_instances=0,
            max_eval_instances=100,
            num_outputs=1,
            num_train_trials=1,
            temperature=0.0,
            max_tokens=0,
        ),
        metric_specs=[
            MetricSpec("helm.benchmark.metrics.language_modeling_metrics.LanguageModelingMetric", args={"names": []})
        ],
        groups=["documents"],
    )


def save_model(folder: Path, *, added: str, special: dict[str, str]) -> Path:
    """Saves a tiny Llama with a context of 40 tokens, a tokenizer of letter pairs and what its configuration names special."""
    model = save_tiny("llama", folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    save_pair_tokenizer(model, template=f"{added} $A")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    return model


def expected_logprobs(folder: Path, ids: list[int], prefix: list[int], added: list[int]) -> list[float]:
    """The definition: every token once, behind as many tokens as the context holds besides those to predict.

    Args:
        folder: Of the model.
        ids: The document's tokens.
        prefix: What HELM puts before the document.
        added: What the tokenizer puts before every text.
    """
    reference, room = Reference(folder), CONTEXT - len(added)
    first, before = room - len(prefix), prefix or added
    logprobs = reference.score(before + ids[:first])[len(before) :]
    while len(logprobs) < len(ids):
        end = min(len(logprobs) + room - 1, len(ids))
        logprobs += reference.score(added + ids[end - room : end])[len(logprobs) - end :]
    return logprobs


def metrics(suite: Path) -> dict[str, float]:
    """Returns sums over all windows, which HELM writes as means of them, and what it derives of these."""
    num_windows = len(read(suite, "documents", "scenario_state.json")["request_states"])
    means = {stat["name"]["name"]: stat["mean"] for stat in read(suite, "documents", "stats.json") if "mean" in stat}
    return means | {name: means[name] * num_windows for name in ("logprob", "num_bytes", "num_perplexity_tokens")}


@pytest.mark.parametrize(
    ("added", "special", "prefix", "runner"),
    [
        ("<s>", {"bos_token": "<s>", "eos_token": "</s>"}, [1], FlexGenRunner),
        ("<s>", {"bos_token": "<s>", "eos_token": "</s>"}, [1], Runner),
        ("", {"bos_token": "<s>", "eos_token": "</s>"}, [1], FlexGenRunner),
        ("", {"eos_token": "</s>"}, [2], FlexGenRunner),
        # The first token of a document has no context and counts as certain: HELM's rule without a prefix token.
        ("", {}, [], FlexGenRunner),
        # As in XGLM, and as in GLM.
        ("</s>", {"bos_token": "<s>", "eos_token": "</s>"}, [2], FlexGenRunner),
        ("</s> <s>", {"eos_token": "</s>"}, [], FlexGenRunner),
    ],
)
def test_every_token_of_a_document_is_predicted_once(
    added: str, special: dict[str, str], prefix: list[int], runner: type[Runner], run_suite: RunSuite, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, added=added, special=special)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    # Shorter than a window, all lengths around one and two full ones, and many windows.
    documents = [LETTERS[: 2 * tokens] for tokens in (1, 2, 37, 38, 39, 40, 41, 76, 77, 78, 79, 80, 150)]
    stats = metrics(run_suite([perplexity_spec(folder, documents)], runner))
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in documents]
    before = [SPECIAL.index(token) for token in added.split()]
    logprobs = [expected_logprobs(folder, document, prefix, before) for document in ids]
    num_tokens, total = sum(map(len, ids)), sum(map(sum, logprobs))
    assert [len(scored) for scored in logprobs] == [len(document) for document in ids]
    tolerance = PROMPT_TOLERANCE * num_tokens
    assert stats["num_perplexity_tokens"] == pytest.approx(num_tokens)
    assert stats["num_bytes"] == pytest.approx(sum(map(len, documents)))
    assert stats["logprob"] == pytest.approx(total, abs=tolerance)
    assert stats["perplexity"] == pytest.approx(math.exp(-total / num_tokens), rel=PROMPT_TOLERANCE)
    assert stats["bits_per_byte"] == pytest.approx(-total / sum(map(len, documents)) / math.log(2), rel=1e-3)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_no_window_has_two_bos_tokens_or_is_longer_than_the_context(
    adds_bos: bool, run_suite: RunSuite, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, added="<s>" if adds_bos else "", special={"bos_token": "<s>"})
    suite = run_suite([perplexity_spec(folder, [LETTERS])], execution={"dry_run": True})
    prompts = [state["request"]["prompt"] for state in read(suite, "documents", "scenario_state.json")["request_states"]]
    assert [prompt.startswith("<s>") for prompt in prompts] == [True, *[False] * (len(prompts) - 1)]
    options: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(folder),
        "max_length": CONTEXT,
        "vocab_size": VOCAB_SIZE,
    }
    inputs = [prepare(Job(prompt=prompt, max_new_tokens=0, score_prompt=True), **options).input_ids for prompt in prompts]
    assert [ids.count(1) for ids in inputs] == [1 if adds_bos or prompt.startswith("<s>") else 0 for prompt in prompts]
    assert max(map(len, inputs)) == CONTEXT


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(adds_bos=True), metaspace_bpe(adds_bos=True)])
def test_bits_per_byte_counts_the_bytes_of_any_text(
    tokenizer: PreTrainedTokenizerBase, run_suite: RunSuite, tmp_path: Path
) -> None:
    """Within a window; where one ends inside a character, HELM itself drops the character's part."""
    documents = [
        "naïve café, 中文 日本語",
        "👩\u200d👩\u200d👧 emoji",
        "שלום עולם",
        "tab\tand\n\nlines  ",
        "bytes:\\xe2 is text",
        "¼½¾",
    ]
    stats = metrics(run_suite([perplexity_spec(save_llama(tokenizer, tmp_path / "a" / "b"), documents)]))
    assert stats["num_bytes"] == pytest.approx(sum(len(text.encode()) for text in documents))
