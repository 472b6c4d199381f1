"""Compare what the planner predicts with what is measured, policy by policy.

Every policy answers its jobs in this process. Right before and right after each run the rates that it needs most are measured:
layers of its rows, unpacking, the disk, the link. The prediction is made with their mean. A run whose binding rates differ by
more than 10 % before and after does not count, nor one beside which layers take 10 % longer than their processor time, since
others work on the machine. The means of three runs that count are compared; if none of nine counts, a policy's processor time
is compared in place of the time by the clock on the wall. Exit status 1 if the errors are larger than 8 % on the median or 15 %
at worst, or the rank correlation is below 0.9.

Command: ``python -m flexgen_helm.runs.policy_validation --threads 1``
On a GPU: ``python -m flexgen_helm.runs.policy_validation --device cuda --model facebook/opt-1.3b``
``--peaks`` measures memory alone, on a machine that others use too; each policy has a process of its own for that.
``--matrix`` compares `auto` with the default policy by the simulator instead, on machines that need not exist here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from flexgen_helm import Engine
from flexgen_helm.errors import FlexGenError
from flexgen_helm.loading.source import open_dummy
from flexgen_helm.memory.device import Device, resolve_device
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.runs.command_line import add_json, exit_on_sigterm, make_parser, prepare_libraries, reports_errors, write_json
from flexgen_helm.runs.policy_validation.cases import CASES, Case, Sizes, write_config
from flexgen_helm.runs.policy_validation.matrix import run_matrix
from flexgen_helm.runs.policy_validation.measuring import RUNS, TRIES, Outcome, measure, outcome_of
from flexgen_helm.runs.policy_validation.peaks import Peaks, load_code, peaks_alone, peaks_here
from flexgen_helm.runs.policy_validation.rates import Bench
from flexgen_helm.runs.policy_validation.report import (
    are_close,
    cells,
    draw,
    header,
    in_words,
    peaks_table,
    peaks_text,
    row,
    summary,
)
from flexgen_helm.runtime.planning.machine_profile import Subject, machine_profile

MEDIAN, WORST, RANK = 0.08, 0.15, 0.9
"""Errors and rank correlation that are asked for."""
SIZES = {
    "prompts": "num_prompts",
    "prompt-len": "prompt_len",
    "new-tokens": "new_tokens",
    "long-prompt-len": "long_prompt_len",
}
"""Fields of `Sizes` by their options."""


def chosen(names: list[str] | None) -> list[Case]:
    """Return the cases whose names contain one of some texts.

    Raises:
        FlexGenError: If a text is in no name.
    """
    for name in names or ():
        if not any(name in case.name for case in CASES):
            raise FlexGenError(f"No policy is named {name!r}. There are: {'; '.join(case.name for case in CASES)}.")
    return [case for case in CASES if names is None or any(name in case.name for name in names)]


def all_peaks(options: argparse.Namespace) -> dict[str, Peaks]:
    """Measure the peaks of memory of all policies, each in a process of its own."""
    named = {"device": options.device, "dtype": options.dtype, "threads": options.threads}
    named |= {name: getattr(options.sizes, field) for name, field in SIZES.items()}
    if options.model is not None:
        named["model"] = options.model
    arguments = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    found: dict[str, Peaks] = {}
    for case in chosen(options.policies):
        found[case.name] = peaks_alone(arguments, case.name)
        if not options.quiet:
            _say(f"{case.name}: {peaks_text(found[case.name])}")
    return found


def one_peak(options: argparse.Namespace) -> int:
    """Measure the peaks of one policy in this process, and print them as JSON."""
    (case,) = (case for case in CASES if case.name == options.one_peak)
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = replace(case, policy=replace(case.policy, gpu_batch_size=4, gpu_batch_tokens=16))
        load_code(folder / "tiny", options.dtype, lambda model: _engine(tiny, model, options.dtype, device, folder / "code"))
        model = options.model or str(write_config(folder / "small-llama"))
        source = open_dummy(model, dtype=options.dtype, device=device.torch_device)
        with _engine(case, model, options.dtype, device, folder) as engine:
            found = peaks_here(engine, source, case.jobs(options.sizes, engine.vocab_size))
    print(json.dumps(found._asdict()))
    return 0


def run_cases(options: argparse.Namespace, model: str, folder: Path, peaks: Mapping[str, Peaks]) -> Iterator[Outcome]:
    """Run one policy after the other, and yield what was found."""
    device = resolve_device(options.device)
    source = open_dummy(model, dtype=options.dtype, device=device.torch_device)
    for case in chosen(options.policies):
        subject = Subject(source, resolved(case.policy, device))
        say = _say if not options.quiet else _nothing
        bench = Bench(device, source, folder, machine_profile(device, subject=subject, folder=folder, say=say))
        with _engine(case, model, options.dtype, device, folder) as engine:
            jobs = case.jobs(options.sizes, engine.vocab_size)
            say(f"{case.name}: {len(jobs)} jobs")
            runs = measure(engine, jobs, bench, runs=options.runs, tries=options.tries)
            yield outcome_of(case.name, runs, peaks[case.name])


def _engine(case: Case, model: str, dtype: str, device: Device, folder: Path) -> Engine:
    return Engine.from_pretrained(
        model,
        dtype=dtype,
        device=device,
        policy=case.policy,
        compression=case.compression,
        offload_folder=folder / (case.compression or case.policy.slab_coding),
        dummy_weights=True,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser: argparse.ArgumentParser = make_parser("policy_validation", __doc__)
    parser.add_argument(
        "--model", metavar="NAME", help="a config's name or folder; weights are made up (default: a small Llama)"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--policies", nargs="+", metavar="TEXT", help="only those whose names contain one of these")
    parser.add_argument("--prompts", type=int, default=Sizes.num_prompts, metavar="N")
    parser.add_argument("--prompt-len", type=int, default=Sizes.prompt_len, metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=Sizes.new_tokens, metavar="N")
    parser.add_argument("--long-prompt-len", type=int, default=Sizes.long_prompt_len, metavar="TOKENS")
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help="runs of a policy that count, if there are so many")
    parser.add_argument("--tries", type=int, default=TRIES, metavar="N", help="most runs for each of these")
    parser.add_argument("--peaks", action="store_true", help="measure the peaks of memory alone, for which others may work too")
    parser.add_argument("--one-peak", choices=[case.name for case in CASES], help=argparse.SUPPRESS)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw predicted against measured")
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    parser.add_argument("--matrix", action="store_true", help="simulate `auto` and the default on several machines instead")
    parser.add_argument("--machines", nargs="+", metavar="NAME", help="machines of the matrix (default: all)")
    add_json(parser)
    options = parser.parse_args(arguments)
    options.sizes = Sizes(options.prompts, options.prompt_len, options.new_tokens, options.long_prompt_len)
    return options


def validate(options: argparse.Namespace) -> int:
    """Run the policies and print the table; returns the exit status."""
    outcomes: list[Outcome] = []
    peaks = all_peaks(options)
    if options.peaks:
        print(peaks_table(peaks))
        write_json(options.json, {"peaks": {name: each._asdict() for name, each in peaks.items()}})
        return 0 if all(map(are_close, peaks.values())) else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or str(write_config(folder / "small-llama"))
        print(header(), flush=True)
        for outcome in run_cases(options, model, folder, peaks):
            print(row(cells(outcome)), flush=True)
            outcomes.append(outcome)
            write_json(options.json, {"policies": [asdict(each) for each in outcomes], **summary(outcomes)._asdict()})
    print(f"\n{in_words(outcomes)}")
    if options.plot is not None:
        draw(outcomes, options.plot)
    found = summary(outcomes)
    reached: bool = found.median_error <= MEDIAN and found.worst_error <= WORST and not found.rank_correlation < RANK
    return 0 if reached else 1


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    options = parse()
    exit_on_sigterm()
    prepare_libraries(options.threads)
    if options.matrix:
        status: int = run_matrix(options.machines, options.json)
        return status
    return one_peak(options) if options.one_peak else validate(options)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _nothing(text: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
