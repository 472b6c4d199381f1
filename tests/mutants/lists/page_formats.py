"""Stored forms of quantised K and V."""

from tests.mutants.mutant import Mutant

SEALED = "tests/kv_cache/test_sealed_format.py"
FORMULA = f"{SEALED}::test_bytes_and_values_are_those_of_the_formula"
TORCH = f"{SEALED}::test_torch_computes_the_same_bits_as_the_compiled_loops"
ZEROS = f"{SEALED}::test_signs_of_zeros_change_no_byte"
LARGE = f"{SEALED}::test_the_largest_numbers_stay_finite"
FLEXGEN = "tests/kv_cache/test_flexgen_format.py"
ROUNDING = "flexgen_helm/kv_cache/minmax.py"
KERNEL = "flexgen_helm/kv_cache/sealed_kernel.py"
SEALING = "flexgen_helm/kv_cache/seal_kernel.py"

MUTANTS = (
    Mutant(
        name="sealed-zero-above-the-minimum",
        file=ROUNDING,
        old="towards_zero + STEP, towards_zero)",
        new="towards_zero, towards_zero)",
        tests=(TORCH,),
        why="a GPU clips the smallest numbers, and its pages differ from the CPU's",
    ),
    Mutant(
        name="sealed-scale-too-small",
        file=SEALING,
        old="bits_of(x + ZERO) + u32(0xFFFF)",
        new="bits_of(x + ZERO) + u32(0x7FFF)",
        tests=(FORMULA,),
        why="the largest numbers of a channel are clipped",
    ),
    Mutant(
        name="sealed-sign-of-zero",
        file=ROUNDING,
        old="_round_down(low + margin + 0.0)",
        new="_round_down(low + margin if cut_of(bits) else low)",
        tests=(ZEROS,),
        why="equal tokens are sealed as different bytes",
    ),
    Mutant(
        name="sealed-halves-overflow",
        file=ROUNDING,
        old="LARGEST_HALF, LARGEST = 64256.0,",
        new="LARGEST_HALF, LARGEST = 65504.0,",
        tests=(LARGE,),
        why="large float16 values become infinite",
    ),
    Mutant(
        name="sealed-range-overflows",
        file=SEALING,
        old="numbers[i] = min(max(numbers[i], -limit), limit)",
        new="numbers[i] = numbers[i]",
        tests=(LARGE,),
        why="the largest values become infinite",
    ),
    Mutant(
        name="sealed-last-group-reaches-zero",
        file="flexgen_helm/kv_cache/token_rows.py",
        old="x[..., -1:].expand(*x.shape[:-1], missing)",
        new="x.new_zeros(*x.shape[:-1], missing)",
        tests=(TORCH,),
        why="where heads are no multiple of 64, a GPU quantises values coarsely",
    ),
    Mutant(
        name="sealed-odd-rows",
        file="flexgen_helm/kv_cache/token_rows.py",
        old="-(-(self.codes_at * 8 + self.dim * self.bits) // 16) * 2",
        new="-(-(self.codes_at * 8 + self.dim * self.bits) // 8)",
        tests=(FORMULA,),
        why="scales lie at odd addresses",
    ),
    Mutant(
        name="sealed-channels-mixed-up",
        file=KERNEL,
        old="codes_of_bytes[t * width + d]",
        new="codes_of_bytes[t * dim + d]",
        tests=(FORMULA,),
        why="heads whose size is no multiple of 8 get other keys",
    ),
    Mutant(
        name="sealed-gpu-head-mixed-up",
        file="flexgen_helm/kv_cache/sealed_format.py",
        old="return dequantize(codes, numbers).transpose(1, 2)",
        new="return dequantize(codes, numbers).reshape(-1, PAGE_TOKENS, self.dim)",
        tests=(TORCH,),
        why="keys read on a GPU are scrambled",
    ),
    Mutant(
        name="flexgen-empty-pages-are-nan",
        file="flexgen_helm/kv_cache/flexgen_format.py",
        old="torch.where(scale > 0, scale, 1)",
        new="scale",
        tests=(FLEXGEN,),
        why="what a mask hides makes answers NaN",
    ),
    Mutant(
        name="flexgen-empty-pages-are-nan-on-a-cpu",
        file=KERNEL,
        old="divisor = scale if scale > ZERO else ONE",
        new="divisor = scale",
        tests=(FLEXGEN,),
        why="what a mask hides makes answers NaN",
    ),
    Mutant(
        name="flexgen-quantised-twice",
        file="flexgen_helm/kv_cache/flexgen_format.py",
        old="copy_tokens(source, target)",
        new="self.write(*target, self.read(*source))",
        tests=(FLEXGEN,),
        why="answers depend on which sequence came first to a shared page",
    ),
)
