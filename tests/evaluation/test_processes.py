"""HELM's commands as processes: where their output goes, and what is said of one that fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from flexgen_helm.evaluation import processes


def test_the_log_is_shown_with_verbose_and_is_in_the_file_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for helm-run that prints to both streams, and to the screen where it has one."""
    (tmp_path / "stand_in.py").write_text(
        "import os, sys; print('log'); print('warning', file=sys.stderr); number = os.environ.get('FLEXGEN_HELM_CONSOLE')\n"
        "if number: os.write(int(number), b'step')\n"
    )
    monkeypatch.setitem(processes.MODULES, "helm-run", "stand_in")
    for verbose, shown, screen in ((True, "log\nwarning\n", ""), (False, "", "step")):
        log = tmp_path / f"{verbose}.log"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        assert processes.execute(["helm-run"], environment, log, verbose=verbose) == 0
        assert sorted(log.read_text().split()) == ["log", "warning"]
        printed, complaint = capfd.readouterr()
        assert (sorted(printed.split()), complaint) == (sorted(shown.split()), screen)


@pytest.mark.parametrize(
    ("status", "log", "cause"),
    [
        (1, "Traceback (most recent call last):\n  x\nE: 2\nflexgen-helm: DiskFull: it is full\n", "DiskFull: it is full"),
        (1, "a\nTraceback (most recent call last):\n  File x\n    y\nmodule.AnError: one\ntwo\n", "AnError: one two"),
        (
            1,
            "Traceback (most recent call last):\nKeyError: 1\n\nDuring it:\n\nTraceback (most recent call last):\n  x\nE: 2",
            "E: 2",
        ),
        (2, "usage: helm-run\nhelm-run: error: no such option\n\n", "helm-run: error: no such option"),
        (1, "", "It printed nothing."),
        (-9, "x", "It was ended by SIGKILL, which the system sends where memory is exhausted."),
    ],
)
def test_the_cause_is_the_last_error(status: int, log: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(log)
    assert processes.cause_of_failure(status, tmp_path / "log") == cause
