"""What sparse attention costs in prompts, against dense attention.

Both engines are loaded; then each reads a prompt of random tokens in turn, the same for both. Processor time is compared, since
wall time depends on what else runs. Cost: a minute of processor time for two prompts of 2,000 tokens in each.

Command: ``python -m flexgen_helm.runs.sparse_prompts --tokens 2000 6000 --json result.json``
"""

from __future__ import annotations

import random
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.assets import smollm2_folder
from flexgen_helm.runs.command_line import add_json, add_model, make_parser, prepare_libraries, reports_errors, write_json


@dataclass(frozen=True)
class Seconds:
    """The least seconds of processor and wall time for a prompt."""

    variant: str
    dtype: str
    tokens: int
    processor: float
    wall: float


@reports_errors
def main() -> int:
    """Measure and print a table."""
    parser = make_parser("sparse_prompts", __doc__)
    add_model(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000], metavar="N", help="lengths (%(default)s)")
    parser.add_argument("--variant", default="s10", metavar="V", help="as behind the @ of a model (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of the model (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="prompts of each length and side (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (%(default)s)")
    add_json(parser)
    options = parser.parse_args()
    prepare_libraries(options.threads)
    model, found = str(options.model or smollm2_folder()), []
    print("dtype     variant    tokens  processor s   wall s  over dense")
    for dtype in options.dtypes:
        with ExitStack() as stack:
            engines = {
                variant: stack.enter_context(
                    Engine.from_pretrained(model, dtype=dtype, compression=variant, policy=Policy(), device="cpu")
                )
                for variant in (None, options.variant)
            }
            for tokens in options.tokens:
                found += measured(engines, dtype, tokens, options.rounds)
    write_json(options.json, [asdict(x) for x in found])
    return 0


def measured(engines: dict[str | None, Engine], dtype: str, tokens: int, rounds: int) -> list[Seconds]:
    """Let engines read prompts in turn, and print a line for each engine."""
    times: dict[str | None, list[tuple[float, float]]] = {variant: [] for variant in engines}
    for i in range(rounds):
        chance = random.Random(i)
        job = Job(token_ids=[chance.randrange(1000, 40000) for _ in range(tokens)], max_new_tokens=1)
        for variant, engine in engines.items():
            begun = time.process_time(), time.perf_counter()
            engine.run([job], progress=False)
            times[variant].append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
    best = {variant: [min(x) for x in zip(*each, strict=True)] for variant, each in times.items()}
    dense = best[None][0]
    for variant, (processor, wall) in best.items():
        print(
            f"{dtype:9} {variant or 'dense':9} {tokens:7} {processor:12.2f} {wall:8.2f} {processor / dense:11.2f}", flush=True
        )
    return [Seconds(variant or "dense", dtype, tokens, *each) for variant, each in best.items()]


if __name__ == "__main__":
    sys.exit(main())
