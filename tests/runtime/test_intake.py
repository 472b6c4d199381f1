"""Which jobs share work: equal prompts are one piece of work, equal completions are generated once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flexgen_helm import Job
from flexgen_helm.generation.prepare import prepare
from flexgen_helm.generation.sampling import choose
from flexgen_helm.generation.vocabulary import Vocabulary
from flexgen_helm.runtime.intake import Generation, Intake, Ticket, answer
from flexgen_helm.schedule.rows import LogitRequest
from flexgen_helm.schedule.tree import Scores, build_tree
from tests.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
SAMPLED = Job(prompt="The fox", temperature=0.7, top_p=0.9, seed=3, num_completions=2, stop=("\n", "##"), top_logprobs=1)
GREEDY = replace(SAMPLED, temperature=0.0)


def merged(*jobs: Job) -> tuple[int, list[Ticket]]:
    """Number of pieces of work, and the tickets."""
    size = len(TOKENIZER)
    tickets = [Ticket(prepare(job, tokenizer=TOKENIZER, max_length=100, vocab_size=size)) for job in jobs]
    return len(Intake(Vocabulary(TOKENIZER), frozenset()).merge(tickets)), tickets


@pytest.mark.parametrize(
    "other",
    [
        replace(SAMPLED, seed=4),
        replace(SAMPLED, temperature=0.8),
        replace(SAMPLED, temperature=0.0),
        replace(SAMPLED, top_p=0.8),
        replace(SAMPLED, stop=("\n",)),
        replace(SAMPLED, top_logprobs=2),
        replace(SAMPLED, max_new_tokens=17),
    ],
)
def test_completions_that_may_differ_are_generated_apart(other: Job) -> None:
    num_works, (a, b) = merged(SAMPLED, other)
    assert num_works == 1
    assert not set(a.generations) & set(b.generations)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SAMPLED, replace(SAMPLED, stop=("##", "\n", "##"))),
        (SAMPLED, replace(SAMPLED, prompt=None, token_ids=TOKENIZER.encode("The fox", add_special_tokens=False))),
        (SAMPLED, replace(SAMPLED, score_prompt=True)),
        (replace(SAMPLED, seed=None), replace(SAMPLED, seed=0)),
        (GREEDY, replace(GREEDY, seed=8, top_p=0.1, temperature=1e-4)),
    ],
)
def test_completions_that_are_equal_by_definition_are_generated_once(one: Job, other: Job) -> None:
    num_works, (a, b) = merged(one, other)
    assert num_works == 1
    assert a.generations == b.generations


def test_sampled_completions_differ_by_their_index_and_greedy_ones_do_not() -> None:
    _, (sampled, greedy) = merged(SAMPLED, GREEDY)
    assert len(set(sampled.generations)) == 2
    assert len(set(greedy.generations)) == 1
    assert len(greedy.generations) == 2


def test_different_prompts_are_different_work() -> None:
    num_works, _ = merged(SAMPLED, replace(SAMPLED, prompt="The dog"), SAMPLED)
    assert num_works == 2


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_completion_of_a_slice_is_answered_from_its_own_row(device: str) -> None:
    prompts = ["The fox", "The dog", "A hen", "The cat", "An owl"]
    kinds = [GREEDY, replace(GREEDY, top_logprobs=0), replace(SAMPLED, top_logprobs=4), replace(GREEDY, top_logprobs=7)]
    jobs = [replace(kind, prompt=prompt) for prompt in prompts for kind in kinds]
    # One row has jobs of all kinds, the others have one job each.
    _, tickets = merged(*jobs[:4], jobs[5], jobs[10], jobs[15], jobs[16])
    works = list(dict.fromkeys(ticket.work for ticket in tickets if ticket.work is not None))
    for work, node in zip(works, build_tree([work.tokens for work in works]), strict=True):
        work.node = node
    logits = torch.randn(len(works), len(TOKENIZER), generator=torch.Generator().manual_seed(5)).bfloat16().float()
    logits[:, :9] = -math.inf
    logits[2, 13] = logits[2].max()  # a tie with the best
    scores = Scores((0, 11, 12, 13, 14, 15))
    requests = [LogitRequest(i, ((scores, i + 1),), tuple(work.continuations)) for i, work in enumerate(works)]
    answer(requests, logits.to(device))
    for row, work in enumerate(works):
        logprobs = torch.log_softmax(logits[row], -1).tolist()
        assert scores.logprobs[row + 1] == pytest.approx(logprobs[scores.tokens[row + 1]], abs=1e-5)
        assert scores.is_best[row + 1] == bool(logits[row, scores.tokens[row + 1]] == logits[row].max()) == (row == 2)
        ranked = logits[row].sort(descending=True, stable=True).indices.tolist()
        for generation in work.continuations:
            assert isinstance(generation, Generation)
            job, found = generation.job, generation.builder.finish()
            u = None if generation.stream is None else generation.stream.at(0)
            token_id = ranked[0] if u is None else choose(logits[row], temperature=0.7, top_p=0.9, u=u)
            assert found.token_ids == [token_id]
            assert found.logprobs == pytest.approx([logprobs[token_id]], abs=1e-5)
            top = {each.token_id: each.logprob for each in found.top_logprobs[0]}
            assert list(top) == ranked[: job.top_logprobs]
            assert top == pytest.approx({each: logprobs[each] for each in top}, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [48, 49, 50, 51])
def test_a_gpus_softmax_reads_every_row_of_logits_alike(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose sums begin at multiples of 16 bytes."""
    own, row_bytes = torch.log_softmax, list[int]()

    def noting(logits: torch.Tensor, dim: int) -> torch.Tensor:
        assert logits.is_contiguous()
        row_bytes.append(logits.shape[-1] * logits.itemsize)
        return own(logits, dim)

    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(0)).expand(5, vocab)
    scores = Scores(tuple(range(5)))
    requests = [LogitRequest(i, ((scores, 2),), ()) for i in range(4)] + [LogitRequest(4, ((scores, 4),), ())]
    monkeypatch.setattr(torch, "log_softmax", noting)
    answer(requests, logits.to("cuda"))
    assert [count % 16 for count in row_bytes] == [0]
    expected = own(logits[0].double(), -1)
    assert [scores.logprobs[i] for i in (2, 4)] == pytest.approx([float(expected[i]) for i in (2, 4)], abs=1e-5)
