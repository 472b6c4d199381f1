"""Every kind of request, by client and by runner: every instance equals plain ``transformers``."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tests.helm.entries import ALL, COMPLETIONS, KINDS, install_capitals
from tests.helm.suites import assert_equal_transformers
from tests.text_models import save_llama
from tests.tiny_tokenizers import byte_level, metaspace_bpe, metaspace_unigram

pytestmark = [pytest.mark.timeout(7200), pytest.mark.usefixtures("close_engine")]
SMALL_ROWS = {"gpu_batch_size": 16, "gpu_batch_tokens": 64}


@pytest.fixture(scope="module")
def output(helm_output: Path) -> Path:
    install_capitals(helm_output)
    return helm_output


def test_every_kind_of_entry(tmp_path: Path, output: Path) -> None:
    model = save_llama(metaspace_bpe(adds_bos=True), tmp_path / "kinds")
    assert_equal_transformers(KINDS, model, output, 2, policy=SMALL_ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(metaspace_bpe(adds_bos=True), id="llama-2"),
        pytest.param(byte_level(adds_bos=True), id="llama-3"),
        pytest.param(metaspace_unigram(), id="unigram"),
    ],
)
def test_every_entry_with_tokenizers_of_all_kinds(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, output: Path, request: pytest.FixtureRequest
) -> None:
    model = save_llama(tokenizer, tmp_path / request.node.callspec.id)
    assert_equal_transformers(ALL, model, output, 2, policy=SMALL_ROWS)


@pytest.mark.slow
def test_a_real_model_on_few_instances(real_model: Path, output: Path) -> None:
    assert_equal_transformers(COMPLETIONS, real_model, output, 1, policy=SMALL_ROWS)


@pytest.mark.slow
def test_every_entry_on_a_real_model(real_model: Path, output: Path) -> None:
    assert_equal_transformers([*ALL, "perplexity:path=sotu_2026.txt"], real_model, output, 50)
