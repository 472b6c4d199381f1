"""Reading of HELM's files: what would give a report wrong numbers or a traceback."""

from tests.mutants.mutant import Mutant

RUNS = "tests/reports/test_runs.py"
SCORES = "tests/evaluation/test_scores.py"
COMPARING, ANSWERS = "tests/reports/test_comparing.py", "tests/reports/test_answers.py"
PRESENTATION = "tests/reports/test_presentation.py"
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
    Mutant(
        name="reports-other-prompts",
        file="flexgen_helm/reports/join.py",
        old='both["prompt_before"] != both["prompt_after"]',
        new='both["prompt_before"] != both["prompt_before"]',
        tests=(COMPARING,),
        why="answers to other prompts are compared",
    ),
    Mutant(
        name="reports-left-out-without-asking",
        file="flexgen_helm/reports/join.py",
        old="if names and not common_runs",
        new="if names and common_runs",
        tests=(COMPARING,),
        why="a candidate that lacks a run is compared without a word",
    ),
    Mutant(
        name="reports-lower-is-better",
        file="flexgen_helm/reports/figures.py",
        old="better = -1 if part.lower_is_better else 1",
        new="better = 1",
        tests=(COMPARING,),
        why="a higher perplexity counts as gained",
    ),
    Mutant(
        name="reports-every-split",
        file="flexgen_helm/reports/figures.py",
        old='rows = rows[rows["counts"]]',
        new="rows = rows[:]",
        tests=(COMPARING,),
        why="instances of another split move the score",
    ),
    Mutant(
        name="reports-zero-log-probabilities",
        file="flexgen_helm/reports/reading.py",
        old="if any(values) else math.nan",
        new="if values else math.nan",
        tests=(ANSWERS,),
        why="log-probabilities that a client does not have are reported as unchanged",
    ),
    Mutant(
        name="reports-last-window",
        file="flexgen_helm/reports/reading.py",
        old="self._parts[key] += 1",
        new="self._parts[key] = 1",
        tests=(ANSWERS,),
        why="windows of a document are one row",
    ),
    Mutant(
        name="reports-other-model",
        file="flexgen_helm/reports/comparing.py",
        old="if not choices.other_models:",
        new="if choices.other_models:",
        tests=(COMPARING,),
        why="a baseline of another model is compared without a word",
    ),
    Mutant(
        name="reports-answers-as-markup",
        file="flexgen_helm/reports/presentation/page.py",
        old="autoescape=True",
        new="autoescape=False",
        tests=(PRESENTATION,),
        why="an answer runs as a script in the reader's browser",
    ),
    Mutant(
        name="reports-formulas",
        file="flexgen_helm/reports/presentation/tables.py",
        old="if isinstance(value, str) else value",
        new="if value is None else value",
        tests=(PRESENTATION,),
        why="an answer runs as a formula in a spreadsheet",
    ),
)
