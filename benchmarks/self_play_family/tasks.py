"""The tasks by name."""

from . import addition, after_sft, language, pronunciation
from .task import Task


TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in (pronunciation, after_sft, addition, language)}


def get_task(name: str, is_quick: bool) -> Task:
    return TASKS[name].shortened() if is_quick else TASKS[name]
