"""Prints which build of torch is installed, and exits with 2 where it does not suit the machine.

A machine without a GPU needs the CPU build. Read from the package's metadata, so that the answer is there before the
CUDA libraries are (several GB), and from torch itself where it can be imported.
"""

import importlib.metadata
import shutil
import subprocess
import sys

ADVICE = """\
This machine shows no GPU, but pip chose a CUDA build of torch, which needs several GB of libraries more.
Install the CPU build: find the address of PyTorch's CPU wheel index on PyTorch's installation page and run

    make setup TORCH_INDEX=<that address>

To keep the CUDA build anyway: make setup TORCH_BUILD=any
"""


def is_cuda_build() -> bool:
    """True where torch's metadata asks for CUDA libraries, or torch says that it was built for CUDA."""
    wanted = importlib.metadata.requires("torch") or []
    if any(name.startswith(("nvidia", "cuda")) for name in wanted):
        return True
    try:
        import torch
    except ImportError:  # its dependencies are not installed yet
        return False
    return torch.version.cuda is not None


def has_gpu() -> bool:
    """True where nvidia-smi lists a device."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def main() -> int:
    cuda, gpu = is_cuda_build(), has_gpu()
    build = "CUDA" if cuda else "CPU"
    print(f"torch {importlib.metadata.version('torch')}: {build} build; this machine has {'a' if gpu else 'no'} GPU")
    if cuda and not gpu:
        print(ADVICE, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
