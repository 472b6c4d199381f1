"""Comparison of two models: what would make a change of the model look smaller, larger or surer than it is."""

from tests.mutants.mutant import Mutant

COMPARE = "tests/fidelity/test_compare.py"
POSITIONS = "tests/fidelity/test_positions.py"
BOOTSTRAP = "tests/statistics/test_bootstrap.py"
WINDOWS = "tests/fidelity/test_windows.py"
HIDDEN = "tests/runtime/test_final_hidden.py"

MUTANTS = (
    Mutant(
        name="fidelity-kl-of-the-reference-from-the-candidate",
        file="flexgen_helm/fidelity/positions.py",
        old="p * (log_p - log_q)",
        new="log_q.exp() * (log_q - log_p)",
        tests=(POSITIONS,),
        why="the divergence is taken the other way round",
    ),
    Mutant(
        name="fidelity-context-counts",
        file="flexgen_helm/fidelity/compare.py",
        old="hidden[window.first - 1 :]",
        new="hidden[: len(window.targets)]",
        tests=(COMPARE,),
        why="a token is compared at a position that predicts another one",
    ),
    Mutant(
        name="fidelity-positions-drawn-alone",
        file="flexgen_helm/statistics/bootstrap.py",
        old="np.unique(np.asarray(groups), return_inverse=True)",
        new="np.unique(np.arange(len(groups)), return_inverse=True)",
        tests=(BOOTSTRAP,),
        why="positions of one text are taken for independent, and intervals are too narrow",
    ),
    Mutant(
        name="fidelity-tokens-between-windows-lost",
        file="flexgen_helm/fidelity/windows.py",
        old="yield tokens[i - 1 : i + size], 1",
        new="yield tokens[i : i + size], 1",
        tests=(WINDOWS,),
        why="the first token of every window counts for nothing",
    ),
    Mutant(
        name="fidelity-bytes-of-what-is-not-predicted",
        file="flexgen_helm/fidelity/windows.py",
        old="len(text.encode()) - unpredicted",
        new="len(text.encode())",
        tests=(WINDOWS,),
        why="bits per byte count a byte for which no bit was needed",
    ),
    Mutant(
        name="fidelity-head-in-a-taken-slot",
        file="flexgen_helm/execution/serial.py",
        old="self._give_up()  # the slots hold the first units of the next sweep",
        new="pass",
        tests=(HIDDEN,),
        why="a streamed output head finds no free slot between two sweeps",
    ),
    Mutant(
        name="fidelity-lent-while-it-computes",
        file="flexgen_helm/runtime/worker.py",
        old="while self._borrowed or (idle and not self._arrived and not self._cancelling):",
        new="while idle and not self._arrived and not self._cancelling:",
        tests=(HIDDEN,),
        why="two threads use one scheduler at once",
    ),
    Mutant(
        name="fidelity-errors-add-up",
        file="flexgen_helm/fidelity/layers.py",
        old="        return right\n\n    reference",
        new="        return hidden\n\n    reference",
        tests=("tests/fidelity/test_layers.py",),
        why="a layer is blamed for the errors of those before it",
    ),
)
