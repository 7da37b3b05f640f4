"""The tasks that a config speaks of: its environments, and the levels of what is held out."""

from conf.schema import TrainConfig
from envs.tasks.curriculum import TaskEntry


def task_entries(config: TrainConfig) -> tuple[TaskEntry, ...]:
    """The environments of the config, one or a mix."""
    env = config.env
    if not env.mix:
        return (TaskEntry(name=env.name, env_id=env.id, weight=1.0, level=env.level, kwargs=env.kwargs),)
    return tuple(
        TaskEntry(name=name, env_id=entry.id, weight=entry.weight, level=entry.level, kwargs=entry.kwargs)
        for name, entry in env.mix.items()
    )


def evaluation_levels(config: TrainConfig) -> range:
    """Levels of held-out tasks; empty = each environment's own."""
    if config.evaluation.level >= 0:
        return range(config.evaluation.level, config.evaluation.level + 1)
    if config.curriculum.sampler in ("uniform", "levels"):
        return range(config.curriculum.min_level, config.curriculum.max_level + 1)
    return range(0)
