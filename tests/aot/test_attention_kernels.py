"""Every attention kernel in every tile size as machine code: see attention_kernels.py."""

import sys
from pathlib import Path

import pytest
import triton

from mimo_kernels.attention.triton.tiles import split_head_dim

from .. import processes
from .attention_kernels import CASES, COLUMNS, PASSES, SHARED_LIMIT

COMPILER = Path(__file__).with_name("attention_kernels.py")
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Local stores at most, all outside of loops. sm_100: two small forward kernels with any Triton. sm_90: dK/dV for 72
# channels, which sets aside what it needs at its end; before Triton 3.9 one value of another kernel. 86 and 120: two or
# three of one kernel for 256 channels.
SPILLS = {80: 0, 86: 0, 89: 0, 90: 6, 100: 4, 120: 0}
if TRITON_VERSION < (3, 9):
    SPILLS |= {86: 2, 90: 1, 100: 5, 120: 3}
# How often, on sm_90, the loop of the bare blocks and that of the masked ones let the tensor cores run dry, for every
# part of the head dimension: before the softmax; dQ and dK/dV once more, before what follows from it.
DRAINS = {"forward": 1, "dq": 2, "dkv": 2}


@pytest.mark.parametrize("arch", CASES)
def test_kernels_fit(arch):
    """No spills, and shared memory a multiprocessor has. sm_90: wgmma (HGMMA) and nothing slower (HMMA); in its
    loops no local memory, and no more waits for the last product than there are (see DRAINS), where ptxas would put one
    behind every product that it serialises. fp32: no matrix unit, which would be tf32."""
    command, env = [sys.executable, COMPILER, arch], processes.environment("TRITON_INTERPRET")
    run = processes.run(command, env=env, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stderr
    rows = [dict(zip(COLUMNS, line.split())) for line in run.stdout.splitlines()[1:]]
    assert {row["pass"] for row in rows} == set(PASSES)
    assert len(rows) > 3 * sum(map(len, CASES[arch].values()))
    for row in rows:
        assert float(row["shared KiB"]) <= SHARED_LIMIT[arch], row
        assert int(row["stores"]) <= SPILLS[arch], row
        if row["dtype"] == "fp32" or row["pass"] == "rows":
            assert row["HGMMA"] == row["HMMA"] == "0", row
        elif arch == 90 and not (row["pass"] == "dkv" and row["head dim"] == "256"):  # see the tables
            assert int(row["HGMMA"]) > 0 and row["HMMA"] == "0" and row["in loops"] == "0", row
            drains = list(map(int, row["drains"].split("+")))
            parts = split_head_dim(int(row["head dim"]))
            assert len(drains) == 2 and max(drains) <= DRAINS[row["pass"]] * len(parts), row
