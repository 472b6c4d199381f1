"""The parts of the check, in the order of what they decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexgen_helm.runs.gpu_check.commands import compare_caches, compare_compiled, generate, run_tests, score
from flexgen_helm.runs.gpu_check.copies import measure_copies
from flexgen_helm.runs.gpu_check.cpu_attention import measure_cpu_attention
from flexgen_helm.runs.gpu_check.forms import compare_forms
from flexgen_helm.runs.gpu_check.kernel import compare_kernel
from flexgen_helm.runs.gpu_check.machine import describe_machine
from flexgen_helm.runs.gpu_check.sizes import Sizes

MOST_SECONDS = 540
"""For all parts that need not be named: of a GPU that is lent for ten minutes, one is for bringing things there and back."""


@dataclass(frozen=True)
class Part:
    """A question, and what answers it in a process of its own."""

    name: str
    question: str
    limit_s: int
    """Seconds after which its process is killed."""
    measure: Callable[[Sizes], dict[str, Any]]
    """Returns plain data: numbers and texts, dictionaries of these, and lists of such dictionaries."""
    by_name: bool = False
    """Whether it runs only where it is named: for a GPU that is at hand for longer."""


PARTS = (
    Part("machine", "Which machine, in which versions?", 20, describe_machine),
    Part("tests", "Do the tests marked gpu pass?", 85, run_tests),
    Part("forms", "Do the same rows have the same bits in products of other forms?", 30, compare_forms),
    Part(
        "kernel",
        "Do the kernels of attention and unpacking serve, and how fast are they beside torch's operators?",
        60,
        compare_kernel,
    ),
    Part("cpu_attention", "How fast does the CPU attend, alone and beside copies of weights?", 45, measure_cpu_attention),
    Part(
        "copies",
        "How long does a small copy wait for a large one, and do both directions hinder each other?",
        25,
        measure_copies,
    ),
    Part("generation", "How fast does OPT-30B generate 32 tokens behind 512 with 15 GiB?", 175, generate),
    Part("scoring", "How fast does it score prompts as long as five examples?", 100, score),
    Part("compiled", "Do compiled layers make a resident model faster?", 300, compare_compiled, by_name=True),
    Part("cache_tiers", "What is a compressed cache on the host worth?", 150, compare_caches, by_name=True),
)
