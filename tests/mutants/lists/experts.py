"""Mixtures of experts: which tokens an expert computes together, and whose output is whose."""

from tests.mutants.mutant import Mutant

SLICES = "tests/model/test_experts.py"

MUTANTS = (
    Mutant(
        name="experts-share-a-slice",
        file="flexgen_helm/model/experts.py",
        old="padding = -counts % size",
        new="padding = -counts % SLICE_STEP",
        tests=(SLICES,),
        why="tokens are computed by an expert that they did not choose",
    ),
    Mutant(
        name="experts-outputs-swapped",
        file="flexgen_helm/model/experts.py",
        old=".view_as(top_k_index), counts",
        new=".view_as(top_k_index).flip(-1), counts",
        tests=(SLICES,),
        why="an expert's output is weighted with the probability of another",
    ),
)
