"""Frame tables and schedules in Python: what a machine without the extension plans with, byte for byte as csrc/ does.

The functions have the names, arguments and refusals of those in mimo_kernels._C; core/host.py says which of both serve.
docs/schedule.md draws what they write.
"""

from mimo_kernels.planner.frame_table import bidirectional as frame_table_bidirectional
from mimo_kernels.planner.frame_table import block_causal as frame_table_block_causal
from mimo_kernels.planner.frame_table import from_cells as frame_table_from_table
from mimo_kernels.planner.frame_table import from_slices as frame_table_from_slices
from mimo_kernels.planner.frame_table import teacher_forcing as frame_table_teacher_forcing
from mimo_kernels.planner.keys import plan_keys
from mimo_kernels.planner.layout import schedule_layout
from mimo_kernels.planner.rows import plan_rows

__all__ = [
    "frame_table_bidirectional",
    "frame_table_block_causal",
    "frame_table_from_slices",
    "frame_table_from_table",
    "frame_table_teacher_forcing",
    "plan_keys",
    "plan_rows",
    "schedule_layout",
]
