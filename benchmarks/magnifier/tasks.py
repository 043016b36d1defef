"""The media that the benchmark is about."""

from __future__ import annotations

from .image_task import IMAGE
from .recordings import AUDIO
from .task import Task
from .video_task import VIDEO

TASKS: dict[str, Task] = {task.name: task for task in (IMAGE, VIDEO, AUDIO)}
