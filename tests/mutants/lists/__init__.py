"""All mutants, a file for each subject."""

from __future__ import annotations

from tests.mutants.lists import attention, durability, generation, loading, memory, requests, schedule

MUTANTS = (
    *attention.MUTANTS,
    *schedule.MUTANTS,
    *generation.MUTANTS,
    *loading.MUTANTS,
    *memory.MUTANTS,
    *requests.MUTANTS,
    *durability.MUTANTS,
)
