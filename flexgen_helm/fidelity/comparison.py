"""A whole comparison: load both models, compare, add the noise floor, keep the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexgen_helm.cache_folder import cache_folder, write_whole
from flexgen_helm.errors import FlexGenError
from flexgen_helm.fidelity.compare import BLOCK_TOKENS, check_vocabularies, compare
from flexgen_helm.fidelity.layers import layer_errors
from flexgen_helm.fidelity.plot import check_matplotlib, draw
from flexgen_helm.fidelity.positions import Positions
from flexgen_helm.fidelity.summary import Plain, floor, summary
from flexgen_helm.fidelity.windows import Reader, Window, Windows
from flexgen_helm.runtime.engine import Engine
from flexgen_helm.statistics.bootstrap import RESAMPLES, SEED
from flexgen_helm.types import Numerics

WINDOW = 512
"""Tokens of a window, unless a model's context is shorter."""
NOISE_TOKENS = 2048
"""Tokens on which the noise floor is measured."""
DTYPES = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
"""By dtype of the reference: the dtype of the model against which it shows what rounding alone does."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The two models, by how they are loaded. No more than two engines are open at a time."""

    reference: str
    """Name, for people."""
    candidate: str
    open_reference: Callable[[], Engine]
    open_candidate: Callable[[], Engine]
    open_rounded: Callable[[str], Engine]
    """Load the reference in another dtype."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared, and where the result goes."""

    file: Path
    is_jobs: bool = False
    window: int | None = None
    """Tokens of a window; None: `WINDOW`, or the shorter of both models' contexts."""
    max_tokens: int | None = None
    """Most tokens of the text; None: all of them."""
    block_tokens: int = BLOCK_TOKENS
    noise_tokens: int = NOISE_TOKENS
    """Tokens on which the noise floor is measured; 0: it is not."""
    out: Path | None = None
    """Folder of the result; None: ``fidelity`` in the cache folder."""
    plot: bool = True
    per_layer: bool = False
    """Whether the error of each layer is measured too."""


@dataclass(frozen=True)
class Kept:
    """A result and its files."""

    result: Plain
    json: Path
    png: Path | None


def run(sides: Sides, options: Options, say: Callable[[str], None] = lambda _: None) -> Kept:
    """Compare two models and keep the result.

    Args:
        sides: The models.
        options: Text, sizes, and where the result goes.
        say: Told what happens, a line at a time.

    Raises:
        FlexGenError: If the models cannot be compared.
        InvalidJob: If the text cannot be used.
    """
    if options.plot:
        check_matplotlib()
    with sides.open_reference() as reference:
        positions, windows, described = _two_models(reference, sides, options, say)
        rounded = floor(positions) if _differ_in_rounding(described, reference) else None
        noise = _floors(reference, windows, sides, options, rounded, say)
    result = {**described, **summary(positions, windows), "noise_floor": noise}
    return _keep(result, positions, windows, options)


def _two_models(
    reference: Engine, sides: Sides, options: Options, say: Callable[[str], None]
) -> tuple[Positions, Windows, Plain]:
    with sides.open_candidate() as candidate:
        check_vocabularies(reference, candidate)
        windows = _windows(reference, candidate, options)
        total = windows.num_positions
        positions = compare(
            reference,
            candidate,
            windows.windows,
            block_tokens=options.block_tokens,
            on_block=lambda done: say(f"{done:,} of {total:,} predictions compared"),
        )
        described = {
            "reference": {"model": sides.reference, "numerics": asdict(reference.numerics)},
            "candidate": {"model": sides.candidate, "numerics": asdict(candidate.numerics)},
            "text": {
                "source": windows.source,
                "digest": windows.digest,
                "positions": windows.num_positions,
                "windows": len(windows.windows),
                "window": windows.length,
            },
            "bootstrap": {"over": windows.groups, "resamples": RESAMPLES, "seed": SEED},
        }
        if options.per_layer:
            say("layer by layer")
            described["per_layer"] = layer_errors(reference, candidate, windows.windows[0].tokens)
    return positions, windows, described


def _windows(reference: Engine, candidate: Engine, options: Options) -> Windows:
    context = min(reference.max_length, candidate.max_length)
    length = options.window or min(WINDOW, context)
    if not 2 <= length <= context:
        raise FlexGenError(f"A window has {length} tokens, but must have 2 to {context}, the models' context. Change --window.")
    reader = Reader(reference.tokenizer, length, options.max_tokens)
    return reader.jobs(options.file) if options.is_jobs else reader.text(options.file)


def _floors(
    reference: Engine,
    windows: Windows,
    sides: Sides,
    options: Options,
    rounded: Plain | None,
    say: Callable[[str], None],
) -> Plain:
    """Return the noise floor; ``rounded`` is what rounding does if that is what was compared."""
    if not options.noise_tokens:
        return {}
    some = _first(windows.windows, options.noise_tokens)
    say("noise floor: the reference against itself")
    again = floor(compare(reference, reference, some, block_tokens=options.block_tokens))
    dtype = reference.numerics.weights.dtype
    what = f"{dtype} against {DTYPES[dtype]}"
    if rounded is None:
        say(f"noise floor: {what}")
        with sides.open_rounded(DTYPES[dtype]) as other:
            rounded = floor(compare(reference, other, some, block_tokens=options.block_tokens))
    return {"self": {"what": "the reference against itself", **again}, "dtype": {"what": what, **rounded}}


def _differ_in_rounding(described: Plain, reference: Engine) -> bool:
    """Return whether the comparison itself is that of the reference with the same model in another dtype."""
    first, second = (described[side]["numerics"]["weights"] for side in ("reference", "candidate"))
    return bool({**first, "dtype": DTYPES[reference.numerics.weights.dtype]} == second)


def _first(windows: tuple[Window, ...], tokens: int) -> list[Window]:
    """Return the first windows that have about so many tokens together, at least one."""
    some: list[Window] = []
    for window in windows:
        if some and sum(len(each.tokens) for each in some) + len(window.tokens) > tokens:
            break
        some.append(window)
    return some


def _keep(result: Plain, positions: Positions, windows: Windows, options: Options) -> Kept:
    folder = options.out or cache_folder() / "fidelity"
    numerics = (Numerics.from_dict(result[side]["numerics"]) for side in ("reference", "candidate"))
    name = "-".join([*map(_digest, numerics), windows.digest[:12]])
    file, picture = folder / f"{name}.json", folder / f"{name}.png" if options.plot else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if picture is not None:
            draw(picture, result, positions.kl)
        write_whole(file, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise FlexGenError(f"The result cannot be written to {folder} ({error}). Give another folder with --out.") from error
    return Kept(result, file, picture)


def _digest(numerics: Numerics) -> str:
    return hashlib.sha256(json.dumps(asdict(numerics), sort_keys=True).encode()).hexdigest()[:12]


def to_json(kept: Kept) -> dict[str, Any]:
    """Return the result with the names of its files."""
    return {**kept.result, "files": {"json": str(kept.json), "png": None if kept.png is None else str(kept.png)}}
