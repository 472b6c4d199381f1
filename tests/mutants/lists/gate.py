"""The regression gate: what would let a regression pass, or stop a build for nothing."""

from tests.mutants.mutant import Mutant

GATES, EXACT, OUTPUT = "tests/gate/test_gates.py", "tests/gate/test_exact.py", "tests/gate/test_output.py"
BASELINE, LM_EVAL = "tests/gate/test_baseline.py", "tests/gate/test_lm_eval.py"

MUTANTS = (
    Mutant(
        name="gate-returned-without-log-probabilities",
        file="flexgen_helm/reports/reading.py",
        old="for part in (values.tobytes(), ",
        new="for part in (",
        tests=(EXACT,),
        why="a flipped bit of a log-probability is called lossless",
    ),
    Mutant(
        name="gate-other-machines-decide",
        file="flexgen_helm/gate/exact.py",
        old="for text in differing(*pair))",
        new="for text in ())",
        tests=(EXACT,),
        why="bits of another machine are judged, and a lossless change fails",
    ),
    Mutant(
        name="gate-cached-answers-vouch",
        file="flexgen_helm/gate/exact.py",
        old="if cached == len(requests):",
        new="if cached > len(requests):",
        tests=(EXACT,),
        why="answers from the cache pass for a change that never computed one",
    ),
    Mutant(
        name="gate-tolerance-of-choices",
        file="flexgen_helm/gate/exact.py",
        old="OF_PROMPTS, 1.0)",
        new="OF_PROMPTS, OF_PROMPTS)",
        tests=(EXACT,),
        why="generated tokens may be off by three times as much",
    ),
    Mutant(
        name="gate-two-sided",
        file="flexgen_helm/gate/gates.py",
        old="if counted.p_worse <= level:",
        new="if counted.p_value <= level:",
        tests=(GATES,),
        why="the level is not that of the one-sided test, and a gain fails",
    ),
    Mutant(
        name="gate-lower-is-better",
        file="flexgen_helm/gate/gates.py",
        old="sign = -1.0 if evidence.part.lower_is_better else 1.0",
        new="sign = 1.0",
        tests=(GATES,),
        why="a perplexity that rose is a gain",
    ),
    Mutant(
        name="gate-spread-as-mean",
        file="flexgen_helm/gate/gates.py",
        old='found["logprob_before"]).abs() / found',
        new='found["logprob_before"]) / found',
        tests=(GATES,),
        why="noise whose mean is 0 is not seen",
    ),
    Mutant(
        name="gate-undecided-is-a-pass",
        file="flexgen_helm/gate/verdict.py",
        old="return PASSED if passed else UNDECIDED",
        new="return PASSED",
        tests=(OUTPUT,),
        why="a check in which nothing vouches for the answers passes",
    ),
    Mutant(
        name="gate-control-characters",
        file="flexgen_helm/gate/output.py",
        old='return UNPRINTABLE.sub("\\ufffd", ',
        new="return str(",
        tests=(OUTPUT,),
        why="a model's text steers the terminal, or breaks the XML",
    ),
    Mutant(
        name="gate-baseline-rounds-scores",
        file="flexgen_helm/gate/baseline.py",
        old="if name in ROUNDED else number",
        new="if name in NUMBERS else number",
        tests=(BASELINE,),
        why="scores of a baseline file differ from those of its runs",
    ),
    Mutant(
        name="gate-lm-eval-all-filters",
        file="flexgen_helm/gate/lm_eval.py",
        old='kept.setdefault(str(sample["doc_id"]), sample)',
        new='kept[str(sample["doc_id"])] = sample',
        tests=(LM_EVAL,),
        why="the last filter is judged where the first is said to be",
    ),
)
