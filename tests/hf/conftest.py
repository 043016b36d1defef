"""Tiny models gain nothing from threads, and lose much where several test processes share the cores."""

import os

import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
