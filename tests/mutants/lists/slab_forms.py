"""Forms of slabs: what is stored, carried and bound; coding without loss and when it is chosen."""

from tests.mutants.mutant import Mutant

STORE = "tests/memory/test_weight_store.py"
PLAN = "tests/policy/test_memory_plan.py"
SLABS = "tests/compression/test_lossless_slab.py"
ENGINE = "tests/runtime/test_lossless.py"
RULE = "tests/policy/test_slab_coding.py"

MUTANTS = (
    Mutant(
        name="slab-decoded-over-a-copy",
        file="flexgen_helm/memory/carrier.py",
        old="self._copied.synchronize()",
        new="self._copied.query()",
        tests=("tests/runtime/test_gpu.py::test_slabs_coded_without_loss_change_no_bit_on_a_gpu",),
        why="a slab is decoded into memory from which another one is still copied",
    ),
    Mutant(
        name="slab-stored-bytes-on-the-link",
        file="flexgen_helm/memory/carrier.py",
        old="count, arrival = form.carried.num_bytes,",
        new="count, arrival = form.stored.num_bytes,",
        tests=(STORE,),
        why="other bytes than the carried ones are copied and reported",
    ),
    Mutant(
        name="plan-decoding-buffer-not-counted",
        file="flexgen_helm/policy/weight_plan.py",
        old='needed["host"] += self._largest_carried(',
        new='needed["host"] += 0 * self._largest_carried(',
        tests=(PLAN,),
        why="a plan that fits runs out of host memory",
    ),
    Mutant(
        name="plan-slots-of-coded-slabs-not-counted",
        file="flexgen_helm/policy/weight_plan.py",
        old="if self.own_memory or shapes.is_packed or shapes.is_coded:",
        new="if self.own_memory or shapes.is_packed:",
        tests=(PLAN,),
        why="a plan that fits runs out of memory on a CPU",
    ),
    Mutant(
        name="lossless-kept-though-larger",
        file="flexgen_helm/compression/lossless_slab.py",
        old="if num_bytes < bound.num_bytes:",
        new="if num_bytes <= 2 * bound.num_bytes:",
        tests=(SLABS,),
        why="slabs take more than the plan allows",
    ),
    Mutant(
        name="lossless-real-bytes-unsaid",
        file="flexgen_helm/runtime/building.py",
        old="plan=blueprint.plan.with_slabs(placed.disk_bytes)",
        new="plan=blueprint.plan.with_slabs({})",
        tests=(f"{ENGINE}::test_bytes_of_each_tier_are_the_real_ones",),
        why="reports show the bytes of plain slabs",
    ),
    Mutant(
        name="lossless-in-the-folder-of-plain-slabs",
        file="flexgen_helm/runtime/slab_places.py",
        old='{} if coding == "plain" else',
        new='{} if coding != "auto" else',
        tests=(f"{ENGINE}::test_codings_do_not_mix",),
        why="coded slabs are taken for weights",
    ),
    Mutant(
        name="lossless-decoding-is-free",
        file="flexgen_helm/policy/slab_coding.py",
        old="self.computing_seconds + self.num_weights / self.decoding_rate)",
        new="self.computing_seconds)",
        tests=(RULE,),
        why="slabs are coded that make every sweep longer",
    ),
    Mutant(
        name="lossless-written-again-each-start",
        file="flexgen_helm/runtime/offload.py",
        old="layouts = {j: found[j] for j in on_disk if j in found}",
        new="layouts = {}",
        tests=(f"{ENGINE}::test_what_was_written_before_the_end_is_used",),
        why="every start codes the whole model again",
    ),
    Mutant(
        name="entropy-exceptions-not-carried",
        file="flexgen_helm/compression/entropy.py",
        old="* steps[places % len(steps)]",
        new="* steps[places // len(steps)]",
        tests=("tests/compression/test_slab_format.py",),
        why="the largest weights are wrong on a GPU",
    ),
    Mutant(
        name="entropy-rows-mixed-up",
        file="flexgen_helm/compression/entropy_kernel.py",
        old="shift, row = u32(u32(r - top) * u32(8)),",
        new="shift, row = u32(u32(r - top) * u32(0)),",
        tests=("tests/compression/test_coding.py",),
        why="rows of a matrix take each other's place on a GPU",
    ),
    Mutant(
        name="plan-carried-bytes-on-the-device-not-counted",
        file="flexgen_helm/policy/weight_plan.py",
        old='(shapes.disk_bytes if self.tiers[j] == "disk" else shapes.carried_bytes)[j]',
        new='(shapes.disk_bytes if self.tiers[j] == "disk" else shapes.stored_bytes)[j]',
        tests=(PLAN,),
        why="a plan that fits runs out of device memory",
    ),
    Mutant(
        name="columns-read-back-from-a-gpu",
        file="flexgen_helm/compression/schemes.py",
        old='unit = float(stored["unit"]) if on_cpu else stored["unit"].float()',
        new='unit = float(stored["unit"])',
        tests=("tests/compression/test_slab_format.py",),
        why="the link waits for the GPU at every matrix",
    ),
    Mutant(
        name="fused-planes-of-whole-blocks",
        file="flexgen_helm/compression/fused/kernel.py",
        old="    return tl.minimum((num_rows + FILLED - 1) // FILLED * FILLED - block * ROWS, ROWS)",
        new="    return ROWS",
        tests=("tests/compression/test_fused.py::test_columns_of_several_widths",),
        why="the last rows of a matrix on a GPU are wrong",
    ),
    Mutant(
        name="fused-trial-compares-nothing",
        file="flexgen_helm/compression/fused/unpack.py",
        old="    if not torch.equal(target, expected.to(dtype)):",
        new="    if False:",
        tests=("tests/compression/test_fused.py::test_a_wrong_kernel_is_refused",),
        why="weights are wrong on a GPU for which the kernel does not serve",
    ),
)
