"""The planner: what an operation takes, what shares are worth, which plan is chosen, and that it fits."""

from tests.mutants.mutant import Mutant

PLANNER = "flexgen_helm/policy/planner"
SEARCH = f"{PLANNER}/search"
COST = "tests/policy/planner/test_cost_model.py"
SIMULATED = "tests/policy/planner/test_simulate.py"
SHARES = "tests/policy/planner/test_shares.py"
SEARCHED = "tests/policy/planner/test_search.py"

MUTANTS = (
    Mutant(
        name="planner-layer-products-counted-once",
        file=f"{PLANNER}/durations.py",
        old="max(2 * elements * tokens / rate",
        new="max(elements * tokens / rate",
        tests=(f"{SIMULATED}::test_where_everything_is_resident_times_add_up",),
        why="a multiplication and an addition count as one operation, so products look twice as fast",
    ),
    Mutant(
        name="planner-weights-not-counted",
        file=f"{SEARCH}/cost_model.py",
        old="busy.add([*durations.slab(j), *durations.weights(j)])",
        new="busy.add(durations.weights(j))",
        tests=(f"{COST}::test_links_take_the_time_of_the_papers_formulas",),
        why="weights on disk look free",
    ),
    Mutant(
        name="planner-link-directions-free-together",
        file=f"{SEARCH}/cost_model.py",
        old="slower = 1 / self.profile.duplex - 1",
        new="slower = 1 - self.profile.duplex",
        tests=(f"{COST}::test_both_directions_of_a_link_are_slower_together",),
        why="writing K and V back looks cheaper than it is beside weights that come",
    ),
    Mutant(
        name="planner-one-round-too-many",
        file=f"{SEARCH}/candidate.py",
        old="rounds = math.ceil(count / live) - 1",
        new="rounds = math.ceil(count / live)",
        tests=(f"{COST}::test_sweeps_of_groups_that_enter_and_leave",),
        why="small blocks look slower than they are",
    ),
    Mutant(
        name="planner-shared-prompts-counted-again",
        file=f"{SEARCH}/features.py",
        old="prompt_tokens=sum(len(node.tokens) for node in users)",
        new="prompt_tokens=sum(len(prompt.tokens) for prompt in prompts)",
        tests=(f"{COST}::test_features_of_a_mixture",),
        why="few-shot prompts look many times slower than they are",
    ),
    Mutant(
        name="planner-working-memory-left-out",
        file=f"{SEARCH}/memory_rows.py",
        old='    rows["device"] += middle.working_bytes\n',
        new="",
        tests=(f"{COST}::test_memory_rows_are_exact_to_within_a_unit",),
        why="the programme fills the device with weights, and no rounding of it fits",
    ),
    Mutant(
        name="planner-hidden-states-on-the-one-ram",
        file=f"{SEARCH}/enumeration.py",
        old="hidden = next(reversed(_supports(space, bounds)), ON_DEVICE)",
        new="hidden = (0.0, 1.0, 1.0)",
        tests=(f"{SHARES}::test_what_is_kept_off_a_tier_gets_no_share_of_it",),
        why="hidden states are copied from RAM to RAM",
    ),
    Mutant(
        name="planner-choice-does-not-keep-demands",
        file=f"{SEARCH}/choose.py",
        old="met = [each for each in known if constraints.met_by(each.prediction)]",
        new="met = known",
        tests=(f"{SEARCHED}::test_demands_are_kept_or_refused_with_what_would_be_possible",),
        why="a policy is returned that is later than the user allows",
    ),
    Mutant(
        name="planner-tier-that-is-off",
        file=f"{SEARCH}/enumeration.py",
        old="float(tier in chosen and tier in bounds.tiers)",
        new="float(tier in chosen)",
        tests=(f"{SHARES}::test_what_is_kept_off_a_tier_gets_no_share_of_it",),
        why="the search asks for tiers that the user has forbidden, and finds nothing",
    ),
    Mutant(
        name="planner-sweep-begins-with-nothing-loaded",
        file=f"{PLANNER}/simulate.py",
        old="    if before is not None:\n        replay.sweep(before)\n",
        new="",
        tests=(f"{SIMULATED}::test_samples_are_close_to_the_replay_of_everything",),
        why="every sweep waits for its first weights in the prediction",
    ),
    Mutant(
        name="planner-rounds-down-only",
        file=f"{SEARCH}/rounding.py",
        old="{math.floor(count + 1e-6), math.ceil(count - 1e-6)}",
        new="{math.floor(count + 1e-6)}",
        tests=(f"{SHARES}::test_layers_on_disk_are_rounded_down_and_up",),
        why="the best plan that fits is not among those that are tried",
    ),
    Mutant(
        name="planner-peak-without-the-workloads-cache",
        file="flexgen_helm/policy/planner/search/sampling.py",
        old="taken = plan.cache.taken_bytes(cache)",
        new="taken = plan.cache.taken_bytes(0)",
        tests=("tests/policy/planner/test_sampling.py",),
        why="a run takes more memory than the plan says",
    ),
)
