"""The watchdog ends a process that hangs, and no other."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(code):
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom common.watchdog import Watchdog\n{code}"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_phase_that_lasts_too_long_ends_the_process_and_is_named():
    done = run('watch = Watchdog(1.5, rank=7)\nwatch("rollout 3")\ntime.sleep(30)\nprint("survived")')
    assert done.returncode == 3 and "survived" not in done.stdout
    assert "rank 7: rollout 3: nothing has moved" in done.stderr and "--collective_timeout_s" in done.stderr
    assert "<module>" in done.stderr  # where it hung


def test_phases_that_move_on_live():
    steps = 'for i in range(8):\n    watch(f"step {i}")\n    time.sleep(0.3)\n'
    done = run(f'watch = Watchdog(1.5, rank=0)\n{steps}watch.close()\ntime.sleep(2)\nprint("survived")')
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "survived", "")
