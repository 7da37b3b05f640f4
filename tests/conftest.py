"""What every test runs under."""

import os


def pytest_configure() -> None:
    """Before torch, ray and wandb are imported: one thread each, nothing sent anywhere, nothing asked."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["WANDB_MODE"] = "offline"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("WANDB_API_KEY", None)
