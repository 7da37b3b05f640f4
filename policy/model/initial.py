"""Which weights a run begins with."""

from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import PolicyConfig

if TYPE_CHECKING:
    from policy.model.model import PolicyModel

SHIPPED = Path(__file__).parents[1] / "warm_starts"
"""Warm starts that come with Shoal: "<preset>-<env name>.safetensors", each made by `shoal sft` (see its card)."""


def initial_weights_file(config: PolicyConfig, env_name: str) -> Path | None:
    """The file a run's weights are read from; None where the model has its own: random, or those of its folder.

    Raises ValueError naming what is missing and the command that makes it.
    """
    if config.init == "random" or (config.kind == "hf" and config.init == "auto"):
        return None
    if config.init == "auto":
        path = _shipped(config, env_name)
        if path is None:
            raise ValueError(
                f"no shipped warm start for policy.preset={config.preset!r} with env {env_name!r}"
                f"{' and overrides' if config.overrides else ''}: make one with `shoal sft env=... policy.init=shop_db "
                f"sft.steps=30 sft.output=warm.safetensors` and pass policy.init=warm.safetensors, or pass "
                f"policy.init=random"
            )
        return path
    path = Path(config.init)
    candidates = [path / "model.safetensors", path / "weights.safetensors"] if path.is_dir() else [path]
    for candidate in candidates:  # a model folder, a run's checkpoint, or the file itself
        if candidate.is_file():
            return candidate
    if found := _shipped(config, config.init):
        return found
    names = sorted(
        path.stem.removeprefix(f"{config.preset}-") for path in SHIPPED.glob(f"{config.preset}-*.safetensors")
    )
    raise ValueError(
        f"policy.init={config.init!r} is no file, no checkpoint folder, and no environment with a shipped warm start "
        f"for policy.preset={config.preset!r} ({', '.join(names) or 'there are none'})"
    )


def _shipped(config: PolicyConfig, env_name: str) -> Path | None:
    path = SHIPPED / f"{config.preset}-{env_name}.safetensors"
    return path if config.kind == "hybrid" and not config.overrides and path.exists() else None


def load_initial_weights(model: "PolicyModel", config: PolicyConfig, env_name: str) -> Path | None:
    """Load them in place. Raises WeightSyncError naming the tensor where file and model differ."""
    from safetensors.numpy import load_file  # here, for the file's name is also asked for where torch is not wanted

    from policy.model.checkpoint_io import load_numpy_tensors

    path = initial_weights_file(config, env_name)
    if path is not None:
        load_numpy_tensors(model, load_file(str(path)))
    return path
