"""The entropy-coded quantizer, its frames, and lossless planes."""

from tests.mutants.mutant import Mutant

ENTROPY = "tests/compression/test_entropy.py"
CODING = "tests/compression/test_coding.py"
LOSSLESS = "tests/compression/test_lossless.py"

MUTANTS = (
    Mutant(
        name="entropy-steps-undamped",
        file="flexgen_helm/compression/entropy.py",
        old="EXPONENT = 0.35",
        new="EXPONENT = 0.5",
        tests=(ENTROPY,),
        why="steps follow the square root of the inputs, which loses more",
    ),
    Mutant(
        name="entropy-no-floor",
        file="flexgen_helm/compression/entropy.py",
        old="FLOOR = 0.5",
        new="FLOOR = 0.01",
        tests=(ENTROPY,),
        why="columns of small inputs get far coarser steps",
    ),
    Mutant(
        name="entropy-columns-free",
        file="flexgen_helm/compression/entropy.py",
        old="num_columns * COLUMN_BITS",
        new="num_columns",
        tests=(ENTROPY,),
        why="steps and classes of columns are not counted",
    ),
    Mutant(
        name="entropy-steps-not-fitted",
        file="flexgen_helm/compression/entropy.py",
        old="torch.where(fitted > 0, fitted, steps.half())",
        new="steps.half()",
        tests=(ENTROPY,),
        why="stored steps are those of rounding",
    ),
    Mutant(
        name="entropy-columns-vanish",
        file="flexgen_helm/compression/entropy.py",
        old="torch.minimum(self.relative_steps(rule.typical) * rule.factor, self.largest)",
        new="self.relative_steps(rule.typical) * rule.factor",
        tests=(ENTROPY,),
        why="all weights of a column become 0",
    ),
    Mutant(
        name="entropy-exceptions-forgotten",
        file="flexgen_helm/compression/entropy.py",
        old="integers.view(-1)[coded.places] = coded.values.float()",
        new="pass",
        tests=(ENTROPY,),
        why="outliers are cut to 127 steps",
    ),
    Mutant(
        name="entropy-exceptions-not-unpacked",
        file="flexgen_helm/compression/entropy_kernel.py",
        old="f32(values[exception])",
        new="f32(LARGEST)",
        tests=(CODING,),
        why="unpacked outliers are cut to 127 steps",
    ),
    Mutant(
        name="entropy-halves-up",
        file="flexgen_helm/compression/entropy_kernel.py",
        old="((bits >> u32(16)) & u32(1))",
        new="u32(1)",
        tests=(CODING,),
        why="halfway numbers are rounded up in bf16, unlike by torch",
    ),
    Mutant(
        name="entropy-subnormal-halves",
        file="flexgen_helm/compression/entropy_kernel.py",
        old="found if x > SMALLEST_NORMAL_HALF else",
        new="found if x > u32(0) else",
        tests=(CODING,),
        why="the smallest fp16 numbers are wrong",
    ),
    Mutant(
        name="entropy-places-of-the-matrix",
        file="flexgen_helm/compression/coding.py",
        old="places[slice(*ends)] - rows.start * columns",
        new="places[slice(*ends)]",
        tests=(CODING,),
        why="exceptions of later blocks are lost",
    ),
    Mutant(
        name="entropy-no-checksum",
        file="flexgen_helm/compression/coding.py",
        old="write_checksum=True",
        new="write_checksum=False",
        tests=(CODING, LOSSLESS),
        why="damaged weights are used",
    ),
    Mutant(
        name="entropy-length-unchecked",
        file="flexgen_helm/compression/coding.py",
        old="(found := zstandard.frame_content_size(frame)) == num_bytes",
        new="(found := zstandard.frame_content_size(frame)) >= 0",
        tests=(CODING,),
        why="frames in another order are taken, or end the process with a NumPy error",
    ),
    Mutant(
        name="lossless-sign-lost",
        file="flexgen_helm/compression/lossless_kernel.py",
        old="(x & u16(0x80)) << u16(8)",
        new="(x & u16(0x00)) << u16(8)",
        tests=(LOSSLESS,),
        why="negative weights become positive",
    ),
    Mutant(
        name="lossless-frames-from-the-first",
        file="flexgen_helm/compression/lossless.py",
        old="planes.count + sum(planes.sizes[: frames.start])",
        new="planes.count",
        tests=(LOSSLESS,),
        why="a thread decodes another one's frames",
    ),
)
