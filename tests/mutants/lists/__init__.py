"""All mutants, a file for each subject."""

from __future__ import annotations

from tests.mutants.lists import (
    attention,
    durability,
    entropy_coding,
    experts,
    fidelity,
    gate,
    generation,
    gpu,
    loading,
    memory,
    page_formats,
    planner,
    profile,
    reports,
    requests,
    schedule,
    sealed_decode,
    sealed_pages,
    slab_forms,
    statistics,
)

MUTANTS = (
    *attention.MUTANTS,
    *schedule.MUTANTS,
    *generation.MUTANTS,
    *loading.MUTANTS,
    *memory.MUTANTS,
    *reports.MUTANTS,
    *gate.MUTANTS,
    *requests.MUTANTS,
    *durability.MUTANTS,
    *fidelity.MUTANTS,
    *statistics.MUTANTS,
    *profile.MUTANTS,
    *planner.MUTANTS,
    *gpu.MUTANTS,
    *experts.MUTANTS,
    *entropy_coding.MUTANTS,
    *slab_forms.MUTANTS,
    *sealed_decode.MUTANTS,
    *sealed_pages.MUTANTS,
    *page_formats.MUTANTS,
)
