"""`auto` against the default policy, simulated: models, memory limits and workloads on machines that need not exist here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median

from flexgen_helm.errors import FlexGenError, PolicyError
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.machine.profile_file import named_profile
from flexgen_helm.memory.amounts import parse_max_memory
from flexgen_helm.memory.device import resolve_device
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.search.choose import Problem, choose_policy, default_policy
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.policy.space import Space
from flexgen_helm.runs.command_line import write_json
from flexgen_helm.runtime.planning.command import planned_shapes, space_of
from flexgen_helm.runtime.planning.machine_profile import machine_profile
from flexgen_helm.runtime.planning.sources import device_of, open_source
from flexgen_helm.types import ResolvedPolicy

HERE = "this machine"
MOST_SLOWER = 0.03
"""How much slower `auto` may be."""
MACHINES = {
    "t4": (("facebook/opt-6.7b", "8GiB"), ("facebook/opt-30b", "14GiB"), ("meta-llama/Llama-3.1-8B", "12GiB")),
    "h100": (("facebook/opt-30b", "15GiB"), ("meta-llama/Llama-3.1-8B", "12GiB"), ("meta-llama/Llama-3.1-70B", "70GiB")),
    "laptop-8gib": (("facebook/opt-1.3b", "2GiB"), ("facebook/opt-2.7b", "4GiB"), ("meta-llama/Llama-2-7b-hf", "6GiB")),
    HERE: (("facebook/opt-1.3b", "2GiB"), ("facebook/opt-2.7b", "4GiB"), ("meta-llama/Llama-2-7b-hf", "6GiB")),
}
"""By machine: models, and most bytes of their device."""
WORKLOADS = {
    "128 x 512 + 32": Workload.uniform(128, 512, 32),
    "32 x 64 + 64": Workload.uniform(32, 64, 64),
    "score 256 x 320, 256 shared": Workload.uniform(256, 320, 0, shared_prefix=256, score=True),
}


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        machine: Name of the profile.
        model: The model.
        limit: Most bytes of the device, as a text.
        workload: Name of the workload.
        default_seconds: Simulated time of the default policy; None: it does not fit.
        auto_seconds: Simulated time of the policy that the search chooses.
    """

    machine: str
    model: str
    limit: str
    workload: str
    default_seconds: float | None
    auto_seconds: float

    @property
    def ratio(self) -> float | None:
        """Time of `auto` over that of the default; None: the default does not fit."""
        return None if self.default_seconds is None else self.auto_seconds / self.default_seconds


def cells(machines: Sequence[str]) -> Iterator[Cell]:
    """Search and simulate every combination of some machines."""
    for name in machines:
        machine = machine_profile(resolve_device("cpu")) if name == HERE else named_profile(name)
        device = device_of(machine)
        for (model, limit), (work, workload) in product(MACHINES[name], WORKLOADS.items()):
            shapes = planned_shapes(open_source(model, "auto", device), None)
            space = space_of(machine, parse_max_memory({"device": limit}))
            default = default_policy(shapes, machine, space)
            chosen = choose_policy(Problem.of(shapes, workload, machine, space)).policy
            simulated = [_seconds(shapes, policy, space, workload, machine) for policy in (default, chosen)]
            assert simulated[1] is not None
            yield Cell(name, model, limit, work, simulated[0], simulated[1])


def _seconds(
    shapes: ModelShapes, policy: ResolvedPolicy, space: Space, workload: Workload, machine: MachineProfile
) -> float | None:
    """Return the simulated time of a policy; None: it does not fit."""
    try:
        return simulate(MemoryPlan.of(shapes, policy, space), workload, machine).seconds
    except PolicyError:
        return None


def lines(found: Sequence[Cell]) -> Iterator[str]:
    """Yield the table in Markdown, and what it comes to."""
    yield "| machine | model | device | workload | default s | `auto` s | default / `auto` |"
    yield "|---|---|---|---|---|---|---|"
    for cell in found:
        default = "does not fit" if cell.default_seconds is None else f"{cell.default_seconds:.1f}"
        faster = "" if cell.ratio is None else f"{1 / cell.ratio:.2f}"
        name = cell.model.rpartition("/")[2]
        texts = (cell.machine, name, cell.limit, cell.workload, default, f"{cell.auto_seconds:.1f}", faster)
        yield f"| {' | '.join(texts)} |"
    ratios = [cell.ratio for cell in found if cell.ratio is not None]
    yield ""
    yield (
        f"simulated, {len(found)} cells: `auto` is {1 / median(ratios):.2f} times as fast as the default on the median, "
        f"{1 / max(ratios):.2f} times where it gains least, {1 / min(ratios):.2f} times where it gains most"
    )


def run_matrix(machines: Sequence[str] | None, file: Path | None) -> int:
    """Print the table; returns 1 if `auto` is more than 3 % slower in a cell.

    Args:
        machines: Names of machines; None: all.
        file: File that also gets the result, if any.

    Raises:
        FlexGenError: If there is no such machine, or a profile cannot be measured.
    """
    unknown = [name for name in machines or () if name not in MACHINES]
    if unknown:
        raise FlexGenError(f"The matrix has no machine {unknown[0]!r}. Give one of {', '.join(MACHINES)}.")
    found: list[Cell] = []
    for cell in cells(machines or list(MACHINES)):
        found.append(cell)
        write_json(file, [asdict(each) for each in found])
    print("\n".join(lines(found)))
    return int(any(cell.ratio is not None and cell.ratio > 1 + MOST_SLOWER for cell in found))
