"""What is measured of a way to store weights, and its row in the table."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.larger_than_ram.contenders import Ours


@dataclass(frozen=True)
class Line:
    """The sweeps of a variant that only decode. Seconds are of a sweep."""

    variant: str
    bits_per_weight: float
    sweeps: int
    read_bytes: int
    """Bytes that a sweep reads from the disk."""
    seconds: float
    """The median."""
    fastest: float
    slowest: float
    unpack_seconds: float
    compute_seconds: float
    cpu_seconds: float
    """Processor time of the whole run over its sweeps, with those of the prompts."""
    disk_rate: float
    """Direct reads before and after the run, in bytes a second."""
    load_seconds: float
    """Loading; with quantising, if the variant was not there."""
    peak_bytes: int
    """Most resident memory of the process."""

    def render(self, first: Line) -> str:
        """Make its row; ``first`` is the line that it is compared with."""
        return (
            f"{self.variant:12}{self.bits_per_weight:9.3f}{self.read_bytes / 2**30:11.3f}{self.seconds:9.2f}"
            f"{f'{self.fastest:.2f} to {self.slowest:.2f}':>17}{first.seconds / self.seconds:10.2f}"
            f"{first.read_bytes / self.read_bytes:13.2f}{self.read_bytes / self.seconds / 1e9:8.2f}"
            f"{self.disk_rate / 1e9:9.2f}{self.unpack_seconds / self.seconds:9.0%}{self.compute_seconds / self.seconds:10.0%}"
            f"{self.cpu_seconds:8.2f}{self.load_seconds:9.0f}{self.peak_bytes / 2**30:10.2f}"
        )


def title_row() -> str:
    """Name the columns of `Line.render`."""
    return (
        f"{'':12}{'bits':>9}{'GiB/sweep':>11}{'s/sweep':>9}{'from to':>17}{'faster':>10}{'fewer bytes':>13}{'GB/s':>8}"
        f"{'direct':>9}{'unpack':>9}{'compute':>10}{'cpu s':>8}{'load s':>9}{'peak GiB':>10}"
    )


def measure(variant: str, ours: Ours) -> Line:
    """Take from a run what the table shows.

    Raises:
        FlexGenError: If no sweep only decoded.
    """
    answers = ours.answers
    chosen = [sweep for sweep in answers.sweeps if sweep.decode_tokens and not sweep.prompt_tokens]
    if not chosen:
        raise FlexGenError("No sweep only decoded. Raise --new-tokens.")
    return Line(
        variant=variant,
        bits_per_weight=answers.bits_per_weight,
        sweeps=len(chosen),
        read_bytes=round(median(sweep.disk_read_bytes for sweep in chosen)),
        seconds=median(sweep.seconds for sweep in chosen),
        fastest=min(sweep.seconds for sweep in chosen),
        slowest=max(sweep.seconds for sweep in chosen),
        unpack_seconds=median(sweep.busy_seconds.get("unpack", 0.0) for sweep in chosen),
        compute_seconds=median(sweep.busy_seconds.get("device", 0.0) for sweep in chosen),
        cpu_seconds=answers.processor_s / len(answers.sweeps),
        disk_rate=ours.measured.disk,
        load_seconds=answers.load_s,
        peak_bytes=answers.stats["peak_bytes"],
    )
