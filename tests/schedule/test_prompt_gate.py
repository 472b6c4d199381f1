"""Prompts that do not fill a row: they wait while that is cheaper than the padding, and never for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_helm.schedule.prompt_gate import PromptGate


def gate(row_cost: float) -> PromptGate:
    return PromptGate(row_tokens=64, block_tokens=256, row_cost=row_cost)


@pytest.mark.parametrize("missing", [256, 300, 64, 128, 0])
def test_full_rows_and_full_blocks_never_wait(missing: int) -> None:
    for _ in range(3):
        assert gate(100.0).let_in(missing, filling=1, decoding=1, more_wait=True) == min(missing, 256)


@pytest.mark.parametrize(("decoding", "more_wait"), [(0, True), (5, False)])
def test_nothing_waits_where_nothing_would_come_or_nothing_else_runs(decoding: int, more_wait: bool) -> None:
    assert gate(100.0).let_in(70, filling=1, decoding=decoding, more_wait=more_wait) == 70


@given(st.integers(1, 255), st.integers(1, 9), st.integers(1, 9), st.floats(0.0, 20.0))
def test_a_row_waits_until_its_idle_slots_have_cost_as_much_as_its_padding(
    missing: int, filling: int, decoding: int, row_cost: float
) -> None:
    rest = missing % 64
    prompts = PromptGate(row_tokens=64, block_tokens=256, row_cost=row_cost)
    padding = row_cost * (1 - rest / 64)
    idle = filling * rest / missing
    spent = 0.0
    for _ in range(10_000):
        found = prompts.let_in(missing, filling=filling, decoding=decoding, more_wait=True)
        if found == missing:
            break
        assert found == missing - rest
        spent += idle / (idle + decoding)
    else:
        pytest.fail("the row waits for ever")
    assert spent <= padding + 1e-6
    assert not rest or spent + idle / (idle + decoding) >= padding - 1e-6


def test_what_was_let_in_costs_later_prompts_nothing() -> None:
    prompts = gate(3.0)
    first = [prompts.let_in(32, filling=1, decoding=4, more_wait=True) for _ in range(9)]
    assert first == [*[0] * 7, 32, 0]
    assert prompts.let_in(32, filling=1, decoding=0, more_wait=True) == 32
    assert [prompts.let_in(32, filling=1, decoding=4, more_wait=True) for _ in range(8)] == [*[0] * 7, 32]
