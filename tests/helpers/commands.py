"""Python processes that import what the tests do, and what they say."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def start(*arguments, **how):
    """A process of Python with these arguments; what it says is kept."""
    folders = [ROOT, *(ROOT / name for name in ("examples", "examples/frameworks", "tests/helpers"))]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def finish(*arguments):
    """(exit code, output, errors) of such a process once it has ended; torchrun takes its ranks with it."""
    with start(*arguments) as process:
        try:
            out, err = process.communicate(timeout=240)
        except BaseException:
            process.terminate()
            raise
    return process.returncode, out, err
