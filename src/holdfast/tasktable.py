"""The table of tasks. In a recipe a task is its name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from holdfast.diffusion.denoisers import UNETS
from holdfast.diffusion.denoising import Denoising
from holdfast.models import Architecture
from holdfast.tasks import Classification, Task

TASKS: Mapping[str, Task] = MappingProxyType({"classification": Classification(), "denoising": Denoising()})


def task_for(architecture: Architecture) -> str:
    """The name of the task that a model is made for."""
    return "denoising" if architecture.name in UNETS else "classification"
