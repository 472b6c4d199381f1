"""All mutants, a file for each subject."""

from __future__ import annotations


MUTANTS = (
    *attention.MUTANTS,
    *schedule.MUTANTS,
    *generation.MUTANTS,
    *loading.MUTANTS,
    *memory.MUTANTS,
    *reports.MUTANTS,
    *requests.MUTANTS,
    *durability.MUTANTS,
    *fidelity.MUTANTS,
    *gpu.MUTANTS,
    *entropy_coding.MUTANTS,
)
