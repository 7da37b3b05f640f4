"""Which of the clusters a config names."""

from pathlib import Path

from conf.schema import TrainConfig
from rl.cluster.inprocess import InProcessCluster
from rl.cluster.protocol import Cluster
from rl.cluster.ray import RayCluster


async def start_cluster(config: TrainConfig, folder: Path) -> Cluster:
    """The cluster the config names."""
    if config.cluster.kind == "inprocess":
        return InProcessCluster(config)
    return await RayCluster.start(config, folder)
