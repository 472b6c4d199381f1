"""Mutants of what is particular to a GPU; their tests run on the simulated one."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

BUILDING = "tests/runtime/test_gpu_building.py"
PLACE = "tests/policy/test_attention_place.py"

MUTANTS = (
    Mutant(
        name="gpu-mixed-places-of-attention",
        file="flexgen_helm/policy/attention_place.py",
        old="if machine.is_gpu and place.cpu_attention and place.cache[1] < 1:",
        new="if False:",
        tests=(PLACE,),
        why="an answer depends on the tier that had room for its pages",
    ),
    Mutant(
        name="gpu-place-is-not-in-the-numerics",
        file="flexgen_helm/runtime/building.py",
        old="on_host = device.is_gpu and",
        new="on_host = False and",
        tests=("tests/policy/test_place_in_numerics.py",),
        why="answers of a GPU's and of a CPU's attention share a cache key",
    ),
    Mutant(
        name="gpu-bits-of-another-device",
        file="flexgen_helm/runtime/load_model.py",
        old="if source.device.type != blueprint.source.device.type:",
        new="if False:",
        tests=("tests/rows/test_not_measured.py",),
        why="bit stability that nobody measured is reported",
    ),
    Mutant(
        name="gpu-softmax-from-any-place",
        file="flexgen_helm/generation/replies.py",
        old='if logits.device.type == "cuda" and vocab % ALIGNED:',
        new="if False:",
        tests=("tests/runtime/test_intake.py",),
        why="a log-probability depends on its row in the slice",
    ),
    Mutant(
        name="products-as-the-process-has-them",
        file="flexgen_helm/runtime/worker.py",
        old="with PRECISE_PRODUCTS.hold(), self._pipe",
        new="with self._pipe",
        tests=("tests/runtime/test_precise_products.py",),
        why="a setting of the user changes bits, unseen by the cache key",
    ),
    Mutant(
        name="gpu-read-before-it-is-there",
        file="flexgen_helm/memory/copies.py",
        old="torch.cuda.current_stream(device).synchronize()",
        new="pass",
        tests=("tests/memory/test_copies.py",),
        why="the CPU attends to keys that are still on their way",
    ),
    Mutant(
        name="gpu-without-its-limit",
        file="flexgen_helm/memory/device_limit.py",
        old="if self._limits[where]:",
        new="if False:",
        tests=("tests/memory/test_device_limit.py", BUILDING),
        why="max_memory bounds nothing",
    ),
)
