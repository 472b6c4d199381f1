"""Profiles of machines: what is read, what is counted, and when a kept one holds."""

from tests.mutants.mutant import Mutant

FILE = "flexgen_helm/machine/profile_file.py"
FIELDS = "tests/machine/test_profile.py::test_every_wrong_field_is_named_with_what_it_must_be"
KEPT = "tests/runtime/planning/test_machine_profile.py"

MUTANTS = (
    Mutant(
        name="profile-not-a-number",
        file=FILE,
        old=" or not math.isfinite(value)",
        new="",
        tests=(FIELDS,),
        why="a rate of NaN makes every prediction NaN",
    ),
    Mutant(
        name="profile-rate-of-nothing",
        file=FILE,
        old=" or (value == 0 and name in POSITIVE)",
        new="",
        tests=(FIELDS,),
        why="a rate of 0 is divided by",
    ),
    Mutant(
        name="profile-field-said-twice",
        file=FILE,
        old="object_pairs_hook=_without_repetition",
        new="object_pairs_hook=dict",
        tests=("tests/machine/test_profile.py::test_what_is_no_json_is_said",),
        why="one of two values of a hand-written file is ignored",
    ),
    Mutant(
        name="profile-kept-for-other-rows",
        file="flexgen_helm/runtime/planning/machine_profile.py",
        old='"rows": [self.policy.gpu_batch_size, self.policy.gpu_batch_tokens],',
        new='"rows": [],',
        tests=(f"{KEPT}::test_a_model_is_measured_once_for_its_sizes_dtype_and_rows",),
        why="times of layers for rows of other sizes are used",
    ),
    Mutant(
        name="profile-kept-for-another-machine",
        file="flexgen_helm/runtime/planning/machine_profile.py",
        old="            **machine_identity(self.device.torch_device),\n",
        new="",
        tests=(f"{KEPT}::test_another_machine_threads_or_a_torn_file_are_measured_again",),
        why="a cache folder that moves to another machine brings its rates along",
    ),
    Mutant(
        name="profile-sealed-pages-counted-as-exact",
        file="flexgen_helm/policy/measure_attention.py",
        old="(num_chunks - len(starts)) * CHUNK_PAGES * sealed.format.num_bytes",
        new="(num_chunks - len(starts)) * own // len(starts)",
        tests=("tests/policy/test_measure.py::test_the_bytes_of_a_decode_row_are_those_that_its_plan_reads",),
        why="attention over compressed pages looks three times as fast as it is",
    ),
    Mutant(
        name="profile-spread-of-time-left-out",
        file="flexgen_helm/machine/rounds.py",
        old="(max(values) - min(values)) / middle",
        new="(max(values) - middle) / middle",
        tests=("tests/policy/test_measure.py::test_median_and_spread_are_those_of_the_rounds",),
        why="a busy machine looks steady",
    ),
)
