"""Release of the threads that OpenMP keeps for a thread."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, torch
from flexgen_helm.machine.openmp import release_threads

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
a, b = torch.randn(200, 300), torch.randn(100, 300)
alone = threads()
first = torch.nn.functional.linear(a, b)
kept = threads()
release_threads()
released = threads()
again = torch.equal(torch.nn.functional.linear(a, b), first)
print(kept - alone, released - alone, threads() - alone, torch.get_num_threads(), again)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_threads_end_and_the_next_kernel_starts_them_anew() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "0", "2", "3", "True"]
