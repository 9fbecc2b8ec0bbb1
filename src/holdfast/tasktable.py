"""The table of tasks. In a recipe a task is its name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from holdfast.denoising import Denoising
from holdfast.tasks import Classification, Task

TASKS: Mapping[str, Task] = MappingProxyType({"classification": Classification(), "denoising": Denoising()})
