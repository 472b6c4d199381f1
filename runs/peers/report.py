"""One table of the engine, the peers, and figures that were published or measured elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexgen_helm.runs.agreement import Agreement, compare
from flexgen_helm.runs.larger_than_ram.contenders import Ours, Theirs, Work
from flexgen_helm.runs.peers.contenders import Skipped, token_rate
from flexgen_helm.runs.peers.published import Figure

HEADER = ("", "at a time", "wall s", "token/s", "engine/it", "processor s", "token/proc. s", "engine/it", "load s")
WIDTHS = (12, 11, 10, 10, 11, 13, 15, 11, 9)


@dataclass(frozen=True)
class Row:
    """A contender that was measured."""

    at_a_time: int
    seconds: float
    processor_s: float
    load_s: float
    tokens_per_second: float
    tokens_per_processor_second: float
    engine_ratio: float
    """Tokens per second of the engine over its own."""
    engine_ratio_processor: float
    note: str


def rows_of(work: Work, ours: Ours, peers: Mapping[str, Theirs | Skipped]) -> dict[str, Row | Skipped]:
    """Return the engine's row and one for each peer."""
    us = ours.answers
    tokens = len(us.tokens) * work.new_tokens
    wall, processor = tokens / us.seconds, tokens / us.processor_s
    note = f"{us.stats['sweeps']} sweeps, weights {_placed(us.weight_bytes)}"
    found: dict[str, Row | Skipped] = {
        "engine": Row(len(us.tokens), us.seconds, us.processor_s, us.load_s, wall, processor, 1.0, 1.0, note)
    }
    for name, theirs in peers.items():
        if isinstance(theirs, Skipped):
            found[name] = theirs
            continue
        best = theirs.best[1]
        rate, processor_rate = token_rate(best, work.new_tokens)
        note = f"{_tried(theirs)}; {_agreement(compare(best.tokens, us.tokens, us.gaps))}"
        found[name] = Row(
            at_a_time=best.size,
            seconds=best.seconds,
            processor_s=best.processor_s,
            load_s=best.load_s,
            tokens_per_second=rate,
            tokens_per_processor_second=processor_rate,
            engine_ratio=wall / rate,
            engine_ratio_processor=processor / processor_rate,
            note=note,
        )
    return found


def render(title: str, rows: Mapping[str, Row | Skipped], figures: Sequence[Figure]) -> list[str]:
    """Return the lines of the table."""
    lines = [title, "  " + _line(HEADER)]
    for name, row in rows.items():
        if isinstance(row, Skipped):
            lines.append(f"  {name:{WIDTHS[0]}}skipped: {row.reason}")
            continue
        wall = (f"{row.seconds:.1f}", f"{row.tokens_per_second:.3f}", f"{row.engine_ratio:.2f}")
        processor = (f"{row.processor_s:.1f}", f"{row.tokens_per_processor_second:.3f}", f"{row.engine_ratio_processor:.2f}")
        lines.append(f"  {_line((name, str(row.at_a_time), *wall, *processor, f'{row.load_s:.1f}'))}  {row.note}")
    if figures:
        lines.append("not measured by this command, on other machines:")
        lines += [
            f"  {one.name:{WIDTHS[0]}}{one.tokens_per_second:9.2f} token/s  {one.setting}  ({one.source})" for one in figures
        ]
    return lines


def as_dict(rows: Mapping[str, Row | Skipped], figures: Sequence[Figure]) -> dict[str, Any]:
    """Return the table in plain types."""
    plain = {name: {"skipped": row.reason} if isinstance(row, Skipped) else asdict(row) for name, row in rows.items()}
    return {"measured": plain, "not_measured": [asdict(one) for one in figures]}


def _line(cells: Sequence[str]) -> str:
    return cells[0].ljust(WIDTHS[0]) + "".join(cell.rjust(width) for cell, width in zip(cells[1:], WIDTHS[1:], strict=True))


def _placed(weight_bytes: Mapping[str, int]) -> str:
    whole = max(1, sum(weight_bytes.values()))
    return ", ".join(f"{tier} {count / whole:.0%}" for tier, count in weight_bytes.items() if count)


def _tried(theirs: Theirs) -> str:
    tried = [f"{batch.size}: {batch.seconds:.1f} s" for _, batch in theirs.batches]
    return "batches " + ", ".join([*tried, *([f"{theirs.out_of_memory_at}: killed"] if theirs.out_of_memory_at else [])])


def _agreement(found: Agreement) -> str:
    return f"answers {found.equal} of {found.compared} equal, {found.ties} ties, {found.other} others"
