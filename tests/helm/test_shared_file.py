"""A file that several processes rewrite at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_helm.helm.shared_file import rewrite

ADD = """
import sys
from pathlib import Path
from flexgen_helm.helm.shared_file import rewrite
for _ in range(100):
    rewrite(Path(sys.argv[1]), lambda text: str(int(text or 0) + 1))
"""


def test_no_change_is_lost_between_processes(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "count"
    processes = [subprocess.Popen([sys.executable, "-c", ADD, str(file)]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert int(file.read_text()) == 200
    assert [path.name for path in file.parent.iterdir()] == ["count"]


def test_a_change_that_fails_leaves_the_old_text(tmp_path: Path) -> None:
    file = tmp_path / "count"
    rewrite(file, lambda _: "old")
    with pytest.raises(ZeroDivisionError):
        rewrite(file, lambda _: str(1 / 0))
    assert file.read_text() == "old"
    rewrite(file, lambda text: text + "er")
    assert file.read_text() == "older"
