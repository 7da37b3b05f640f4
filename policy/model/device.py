"""Which device a process computes on, from the GPUs that Ray gave it."""

import torch


def claim_device(gpus: float) -> torch.device:
    """The first GPU that this process sees where it has one or a share of one; else the CPU.

    Ray shows a process the GPUs it assigned and no others. A resource may be named GPU on a machine without one, as on
    a simulated cluster: the CPU then computes. Of a shared GPU no more memory than the share is taken: beyond it this
    process fails, not the one beside it.
    """
    if gpus <= 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", 0)
    if gpus < 1:
        torch.cuda.set_per_process_memory_fraction(gpus, device)
    return device
