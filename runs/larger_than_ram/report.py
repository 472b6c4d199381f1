"""The lines that a person reads of a comparison."""

from __future__ import annotations

from flexgen_helm.memory.amounts import gib
from flexgen_helm.runs.agreement import Agreement
from flexgen_helm.runs.larger_than_ram.contenders import Ours, Theirs, Work
from flexgen_helm.runs.memory_limit.process import Measured


def render(work: Work, theirs: Theirs, ours: Ours, agreement: Agreement) -> list[str]:
    """Make the lines of one part."""
    (measured, best), us, stats = theirs.best, ours.answers, ours.answers.stats
    rows = [
        ("sequences at a time", str(best.size), f"{len(us.tokens)} as one workload"),
        ("seconds", f"{best.seconds:.1f}", f"{us.seconds:.1f}"),
        ("new tokens per second", *(f"{rate * work.new_tokens:.2f}" for rate in (best.rate, us.rate))),
        ("direct reads, GB/s, before / after", _direct(measured), _direct(ours.measured)),
        ("loading, s (not counted)", f"{best.load_s:.1f}", f"{us.load_s:.1f}"),
        (
            "weights in memory",
            f"{best.placed.get('cpu', 0)} of {sum(best.placed.values())} modules",
            _resident(us.weight_bytes),
        ),
    ]
    decoding, direct = us.disk_rate(decoding=True), ours.measured.disk
    aims = f"{decoding / 1e9:.2f} GB/s, {decoding / direct:.0%} of direct reads" if decoding else "there was no such sweep"
    return [
        f"{work.title}: {len(work.prompts)} prompts, {work.new_tokens} new tokens each",
        f"  {'':36}{'Accelerate':>24}{'engine':>24}",
        *(f"  {name:36}{left:>24}{right:>24}" for name, left, right in rows),
        f"  Accelerate's batches, sequences: seconds  {_batches(theirs)}",
        f"  engine: {stats['sweeps']} sweeps, {gib(us.disk_read_bytes)} read; in sweeps that only decode {aims}",
        f"  engine: {stats['prompt_tokens_computed']} of {stats['prompt_tokens_asked']} prompt tokens computed, "
        f"peak of resident memory {gib(stats['peak_bytes'])}",
        f"  answers: {agreement.equal} of {agreement.compared} equal, {agreement.ties} differ at a tie, {agreement.other} "
        f"elsewhere; smallest gap between two best tokens {agreement.smallest_gap:.1e}",
        f"  ratio: {us.rate / best.rate:.2f} times Accelerate",
    ]


def _direct(measured: Measured) -> str:
    return f"{measured.disk_before / 1e9:.2f} / {measured.disk_after / 1e9:.2f}"


def _resident(weight_bytes: dict[str, int]) -> str:
    return f"{1 - weight_bytes['disk'] / max(1, sum(weight_bytes.values())):.0%}"


def _batches(theirs: Theirs) -> str:
    tried = [f"{batch.size}: {batch.seconds:.1f}" for _, batch in theirs.batches]
    return ", ".join([*tried, f"{theirs.out_of_memory_at}: out of memory"] if theirs.out_of_memory_at else tried)
