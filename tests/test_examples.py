"""The files in examples/ do what they say, with stand-ins for Slurm's commands."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
from helpers import forked
from helpers.processes import FOR_HELPERS

ROOT = Path(__file__).parents[1]
SRUN = """#!/bin/bash
# Starts two processes with the variables that srun sets; ends with the largest exit code.
shift  # --kill-on-bad-exit
export SLURM_NTASKS=2 SLURM_JOB_NUM_NODES=1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first; a=$?; wait $second; b=$?
exit $((a > b ? a : b))
"""
SCONTROL = """#!/bin/bash
case "$1" in show) echo localhost;; requeue) echo "requeued $2" >> "$REQUEUED";; esac
"""
USE_OF_MIXER = """
from helpers import models
from lowline.linearize import convert

model = convert(models.teacher(), mixer="decay", options={"half_life": 4.0}).eval()
ids = torch.arange(1, 25)[None]
whole = model(ids).logits
first = model(ids[:, :11], use_cache=True)
rest = model(ids[:, 11:], past_key_values=first.past_key_values, use_cache=True)
torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-5)
print("equal")
made = model.generate(ids, max_new_tokens=5, do_sample=False, min_new_tokens=5)
print("generated" if made.shape == (1, 29) else made.shape)
"""
PYTHON = """#!/bin/bash
# Stands for the trainer: writes down what it was started with.
where="$MASTER_ADDR:$MASTER_PORT"
echo "$RANK/$WORLD_SIZE local $LOCAL_RANK/$LOCAL_WORLD_SIZE $where $*" >> "$STARTED"
exit "$CODE"
"""


def run_sbatch(folder: Path, code: int) -> tuple[int, list[str], bool]:
    """Run examples/slurm.sbatch; return its exit code, the lines of its processes, if requeued."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": "7",
        "STARTED": str(folder / "started"),
        "REQUEUED": str(folder / "requeued"),
        "CODE": str(code),
    }
    script = ROOT / "examples" / "slurm.sbatch"
    done = subprocess.run(
        ["bash", str(script), "demo_cola", "--output=here"], env=environment, check=False
    )
    started = sorted((folder / "started").read_text().splitlines())
    return done.returncode, started, (folder / "requeued").exists()


@pytest.mark.parametrize("code, requeued", [(0, False), (2, False), (1, False), (143, True)])
def test_slurm_job_starts_every_rank_and_is_requeued_after_a_signal_alone(
    tmp_path: Path, code: int, requeued: bool
) -> None:
    returned, started, again = run_sbatch(tmp_path, code)
    assert (returned, again) == (code, requeued)
    command = "-m lowline.train --config demo_cola --output=here"
    assert started == [f"{rank}/2 local {rank}/2 localhost:29500 {command}" for rank in (0, 1)]


def test_the_tutorials_mixer_runs_through_conversion_and_generation(tmp_path: Path) -> None:
    """The code of "Your own mixer" is what the page says, at any split of a sequence."""
    page = (ROOT / "docs" / "tutorials" / "mixer.md").read_text()
    block = page.split("## The class")[1].split("The rules:")[0]
    code = "\n".join(line[4:] for line in block.splitlines() if line.startswith("    "))
    script = tmp_path / "own_mixer.py"
    script.write_text(f"{code}\n{USE_OF_MIXER}")
    done = forked.run([str(script)], env=FOR_HELPERS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal", "generated"]
