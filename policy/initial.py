"""Which weights a run begins with."""

from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import PolicyConfig

if TYPE_CHECKING:
    from policy.model import PolicyModel

SHIPPED = Path(__file__).parent / "weights"
"""Warm starts that come with Shoal: "<preset>-<env name>.safetensors", each made by `shoal sft` (see its card)."""


def initial_weights_file(config: PolicyConfig, env_name: str) -> Path | None:
    """The file a run's weights are read from; None where the model already has its own (random, or kind "hf").

    Raises ValueError naming what is missing and the command that makes it.
    """
    if config.kind == "hf" or config.init == "random":
        return None
    if config.init == "auto":
        path = SHIPPED / f"{config.preset}-{env_name}.safetensors"
        if config.overrides or not path.exists():
            raise ValueError(
                f"no shipped warm start for policy.preset={config.preset!r} with env {env_name!r}"
                f"{' and overrides' if config.overrides else ''}: make one with `shoal sft env=... "
                f"sft.output=warm.safetensors` and pass policy.init=warm.safetensors, or pass policy.init=random"
            )
        return path
    path = Path(config.init)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"policy.init={config.init!r}: no such file or checkpoint folder")
    return path


def load_initial_weights(model: "PolicyModel", config: PolicyConfig, env_name: str) -> Path | None:
    """Load them in place. Raises WeightSyncError naming the tensor where file and model differ."""
    from safetensors.numpy import load_file  # here, for the file's name is also asked for where torch is not wanted

    from policy.checkpoint_io import load_numpy_tensors

    path = initial_weights_file(config, env_name)
    if path is not None:
        load_numpy_tensors(model, load_file(str(path)))
    return path
