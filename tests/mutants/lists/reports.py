"""Reading of HELM's files: what would give a report wrong numbers or a traceback."""

from tests.mutants.mutant import Mutant

RUNS = "tests/reports/test_runs.py"
SCORES = "tests/evaluation/test_scores.py"
CONTENTS = "flexgen_helm/reports/contents.py"

MUTANTS = (
    Mutant(
        name="reports-earlier-measurement",
        file=CONTENTS,
        old='is not None and measured.get("date") == entry["date"]',
        new="is not None",
        tests=(SCORES,),
        why="the speed of an earlier command is reported as this one's",
    ),
    Mutant(
        name="reports-perturbed-as-plain",
        file=CONTENTS,
        old="_perturbation(name), count",
        new="None, count",
        tests=(SCORES,),
        why="the score of perturbed inputs is reported as that of the inputs as they are",
    ),
    Mutant(
        name="reports-join-without-perturbation",
        file=CONTENTS,
        old="perturbation=_perturbation(instance)",
        new="perturbation=None",
        tests=(RUNS,),
        why="a report joins the answers to an instance with those to its perturbed form",
    ),
    Mutant(
        name="reports-dict-as-empty-list",
        file=CONTENTS,
        old="_typed(content, list)]",
        new="content]",
        tests=(RUNS,),
        why="a foreign file is read as a run without requests",
    ),
    Mutant(
        name="reports-unfinished-run",
        file="flexgen_helm/evaluation/scores.py",
        old="run.is_complete and ",
        new="",
        tests=(SCORES,),
        why="a run that was killed between two files ends an evaluation",
    ),
    Mutant(
        name="reports-main-metric-of-a-wide-group",
        file="flexgen_helm/reports/main_metrics.py",
        old='list(reversed(run.spec["groups"]))',
        new='list(run.spec["groups"])',
        tests=(SCORES,),
        why="a run is judged by the metric of a wider group than its own",
    ),
)
