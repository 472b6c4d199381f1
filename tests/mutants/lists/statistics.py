"""Statistics of evaluations: what would make a loss look smaller, or less sure, than it is."""

from tests.mutants.mutant import Mutant

CLUSTERED = "tests/statistics/test_clustered.py"
PAIRED = "tests/statistics/test_paired.py"
FLIPS = "tests/statistics/test_flips.py"
MARGINS = "tests/statistics/test_margins.py"
POWER = "tests/statistics/test_power.py"

MUTANTS = (
    Mutant(
        name="statistics-error-without-clusters",
        file="flexgen_helm/statistics/arrays.py",
        old="np.unique(labels, return_inverse=True)",
        new="np.unique(np.arange(num), return_inverse=True)",
        tests=(CLUSTERED,),
        why="questions of one subject are taken for independent",
    ),
    Mutant(
        name="statistics-error-without-correction",
        file="flexgen_helm/statistics/clustered.py",
        old="count / (count - 1) * ",
        new="",
        tests=(CLUSTERED,),
        why="the error of few clusters is too small",
    ),
    Mutant(
        name="statistics-difference-of-the-other-sign",
        file="flexgen_helm/statistics/paired.py",
        old="Bootstrap(numbers).mean(second - first)",
        new="Bootstrap(numbers).mean(first - second)",
        tests=(PAIRED,),
        why="a loss passes for a gain",
    ),
    Mutant(
        name="statistics-recovery-of-a-baseline-near-zero",
        file="flexgen_helm/statistics/bootstrap.py",
        old="(np.sign(resampled) == np.sign(total)).all()",
        new="(resampled != np.inf).all()",
        tests=("tests/statistics/test_bootstrap.py",),
        why="a ratio without a bound gets an interval",
    ),
    Mutant(
        name="statistics-worse-without-what-was-seen",
        file="flexgen_helm/statistics/flips.py",
        old="special.bdtrc(self.lost - 1,",
        new="special.bdtrc(self.lost,",
        tests=(FLIPS,),
        why="the gate's p is too small, and false alarms exceed the level",
    ),
    Mutant(
        name="statistics-one-side-for-both",
        file="flexgen_helm/statistics/flips.py",
        old="2 * float(",
        new="float(",
        tests=(FLIPS,),
        why="a two-sided p is half of what it should be",
    ),
    Mutant(
        name="statistics-no-loss-among-few-passes",
        file="flexgen_helm/statistics/margins.py",
        old="paired.num_worse == 0 and",
        new="paired.num_worse < 0 and",
        tests=(MARGINS,),
        why="ten equal answers prove that nothing is lost",
    ),
    Mutant(
        name="statistics-margin-by-the-upper-end",
        file="flexgen_helm/statistics/margins.py",
        old="low <= -margin",
        new="high <= -margin",
        tests=(MARGINS,),
        why="what is not known passes",
    ),
    Mutant(
        name="statistics-power-of-one-side",
        file="flexgen_helm/statistics/power.py",
        old="1 - alpha / 2",
        new="1 - alpha",
        tests=(POWER,),
        why="an evaluation claims to see smaller effects than it can",
    ),
)
