"""Triton kernels behind `row_attention`, `hierarchical_attention` and the fine projection, for CUDA.

`FLEXCORE_KERNELS` says when they are used in place of the torch path, which stays the reference and the fallback:

- `off`: never;
- `on`: wherever they apply (`dispatch.py` says where that is);
- `auto`, the default: where `measured.json` says that they were measured on this GPU, at about these sizes, and were
  not slower. The table is written by `python -m benchmarks.kernels --table` on a card. It is empty: nothing has been
  measured yet, so `auto` is the same as `off`.

Triton is imported when a kernel is first used, and its absence means the torch path. In a graph that `torch.compile`
captures, too, the torch path is taken: its operations are fused there.
"""

from .dispatch import INTERPRETED, VARIABLE, mode, projects, reads_out, reads_regions

__all__ = ["INTERPRETED", "VARIABLE", "mode", "projects", "reads_out", "reads_regions"]
