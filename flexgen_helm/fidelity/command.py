"""The command `flexgen-helm fidelity`: from its options to both models."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from flexgen_helm.errors import FlexGenError
from flexgen_helm.fidelity.comparison import Kept, Options, Sides, run
from flexgen_helm.fidelity.memory import halves
from flexgen_helm.memory.device import resolve_device
from flexgen_helm.runtime.engine import Engine

Load = Callable[[Namespace], Engine]


def fidelity(args: Namespace, load: Load, say: Callable[[str], None]) -> Kept:
    """Compare the two models that the options name.

    Args:
        args: Options of the command; one of ``text`` and ``jobs`` is given.
        load: Function that makes an engine from options.
        say: Told what happens, a line at a time.

    Raises:
        FlexGenError: If the options cannot be used or the models cannot be compared.
    """
    _check(args)
    limits = halves(args.max_memory, resolve_device(args.device), args.offload_folder)
    candidate: dict[str, Any] = {
        "model": args.candidate or args.model,
        "dtype": args.candidate_dtype or args.dtype,
        "compression": args.compression,
    }

    def opened(name: str, **changes: Any) -> Engine:
        folder = None if args.offload_folder is None else args.offload_folder / name.replace(" ", "-")
        say(f"loading the {name}")
        options = {**vars(args), "max_memory": limits, "offload_folder": folder, "compression": None, **changes}
        return load(Namespace(**options))

    sides = Sides(
        reference=args.model,
        candidate=candidate["model"],
        open_reference=lambda: opened("reference"),
        open_candidate=lambda: opened("candidate", **candidate),
        open_rounded=lambda dtype: opened("reference in another dtype", dtype=dtype),
    )
    options = Options(
        file=args.text or args.jobs,
        is_jobs=args.jobs is not None,
        window=args.window,
        max_tokens=args.max_tokens,
        block_tokens=args.block_tokens,
        noise_tokens=args.noise_tokens,
        out=args.out,
        plot=not args.no_plot,
        per_layer=args.per_layer,
    )
    return run(sides, options, say)


def _check(args: Namespace) -> None:
    if args.candidate is None and args.candidate_dtype is None and args.compression is None:
        raise FlexGenError("There is no candidate to compare with. Give --candidate, --candidate-dtype or --compression.")
    if args.text is not None and args.jobs is not None:
        raise FlexGenError("--text and --jobs are both given, but one text is compared at a time. Give one of them.")
    if args.noise_tokens < 0:
        raise FlexGenError(f"--noise-tokens is {args.noise_tokens}. Give 0 or more.")
    file = args.text or args.jobs
    if not file.is_file():
        raise FlexGenError(f"There is no file {file}. Correct the path of --text or --jobs.")
