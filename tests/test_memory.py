import subprocess
import sys

import pytest

CODE = """
import resource, sys
import torch
from opsin.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
def use():
    for _ in range(8):
        torch.ones(20_000_000)
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, kept)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tells glibc, which is Linux's")
def test_freed_memory_is_used_again_without_page_faults():
    faults = {}
    for how in ("default", "keep"):
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
        count, kept = done.stdout.split()
        faults[how] = int(count)
        assert kept == str(how == "keep")
    assert faults["keep"] * 20 < faults["default"], faults  # measured: 0 against 156,000
