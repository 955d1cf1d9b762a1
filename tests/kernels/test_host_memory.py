import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from lowline.kernels.host_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("cannot")
torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (1 << 26) // 4096  # of one tensor


def faults(word: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, word], capture_output=True, text=True, timeout=120
    )
    if "cannot" in done.stderr:
        pytest.skip("this C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux's page faults")
def test_large_tensors_reuse_freed_memory():
    assert faults("keep") < PAGES
    assert faults("give back") > PAGES  # else there was nothing to mend
