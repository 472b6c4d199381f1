"""Run entries of every kind of request that HELM's adapters send, and the data for those that nothing else provides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from helm.benchmark.scenarios.scenario import CORRECT_TAG

SHORT = (
    "commonsense:dataset=piqa,method=multiple_choice_separate_original",
    "mmlu:subject=anatomy,method=multiple_choice_joint",
    "synthetic_reasoning:mode=pattern_match",
)
"""Scores of every token of an answer, of the first behind examples, and answers of 50 tokens."""

COMPLETIONS = ("lambada:task=accuracy", "wikifact:k=5,subject=capital")
"""A last word, and several answers to a prompt with examples."""

_OWN_QUESTIONS = "custom_mcqa:path=capitals.jsonl,num_train_instances=3,method=multiple_choice_"
KINDS = (
    *SHORT,
    "lambada:task=perplexity",
    "perplexity:path=capitals.txt",
    "dyck_language:num_parenthesis_pairs=3",
    f"{_OWN_QUESTIONS}separate_calibrated",
)
"""With `COMPLETIONS`, one entry of each kind of request."""

ALL = (
    *KINDS,
    *COMPLETIONS,
    "commonsense:dataset=hellaswag,method=multiple_choice_separate_original",
    f"{_OWN_QUESTIONS}joint",
    f"{_OWN_QUESTIONS}separate_original",
)

CAPITALS = """France Paris|Japan Tokyo|Italy Rome|Peru Lima|Egypt Cairo|Kenya Nairobi|Norway Oslo|Chile Santiago|Cuba Havana
Iran Tehran|Iraq Baghdad|Spain Madrid|Greece Athens|Poland Warsaw|Ireland Dublin|Canada Ottawa|Austria Vienna
Hungary Budapest|Finland Helsinki|Sweden Stockholm|Denmark Copenhagen|Portugal Lisbon|Germany Berlin|Belgium Brussels
Russia Moscow|Ukraine Kyiv|Turkey Ankara|China Beijing|India New Delhi|Nepal Kathmandu|Thailand Bangkok|Vietnam Hanoi
Malaysia Kuala Lumpur|Indonesia Jakarta|Ghana Accra|Philippines Manila|Australia Canberra|Mongolia Ulaanbaatar
Morocco Rabat|Algeria Algiers|Tunisia Tunis|Libya Tripoli|Sudan Khartoum|Ethiopia Addis Ababa|Uganda Kampala
Rwanda Kigali|Zambia Lusaka|Angola Luanda|Namibia Windhoek|Senegal Dakar|Mali Bamako|Brazil Brasília
Argentina Buenos Aires|Colombia Bogotá|Paraguay Asunción|Uruguay Montevideo|Venezuela Caracas|Jamaica Kingston
Iceland Reykjavík|Romania Bucharest|Bulgaria Sofia|Serbia Belgrade|Croatia Zagreb|Estonia Tallinn|Latvia Riga
Moldova Chișinău"""


def install_capitals(output_path: Path) -> None:
    """Writes countries and their capitals as facts to complete, as questions with four choices and as a document."""
    facts = [tuple(fact.split(" ", 1)) for line in CAPITALS.splitlines() for fact in line.split("|")]
    for split, some in (("train", facts[:8]), ("dev", []), ("test", facts[8:])):
        lines = ({"property": "P36", "template": f"The capital of {a} is", "result_names": [[b]]} for a, b in some)
        _write(output_path / "scenarios" / "wikifact" / "data" / f"{split}.jsonl", lines)
    _write(output_path / "scenarios" / "custom_mcqa" / "capitals.jsonl", _questions(facts))
    document = "\n".join(f"The capital of {a} is {b}." for a, b in facts)
    (output_path / "scenarios" / "perplexity" / "capitals.txt").write_text(document, encoding="utf-8")


def _questions(facts: list[tuple[str, ...]]) -> Iterator[object]:
    for number, (country, capital) in enumerate(facts):
        choices = [facts[(number + step) % len(facts)][1] for step in (0, 7, 19, 31)]
        choices = choices[number % 4 :] + choices[: number % 4]
        yield {
            "input": {"text": f"What is the capital of {country}?"},
            "references": [{"output": {"text": choice}, "tags": [CORRECT_TAG] * (choice == capital)} for choice in choices],
            "split": "train" if number < 3 else "test",
        }


def _write(path: Path, lines: Iterator[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
