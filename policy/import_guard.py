"""Makes `import vllm` and `import transformers` work beside packages that were built for another torch.

vLLM's CPU build asks for torchvision, torchaudio and torchcodec, and registries hold their CUDA builds. Beside a CPU
torch these cannot load, and each takes vLLM or transformers down with it. Nobody needs what they compute: torchaudio
and torchcodec are made to look as if they were not installed, and torchvision, whose Python side is needed, gets the
two names that its missing library would have declared. An installation whose parts fit is left alone.

Only the standard library is imported here, and nothing is done until it is asked for: spawned processes load this very
file at their start (policy/import_site/sitecustomize.py).
"""

import importlib.util
import mmap
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

SITE = Path(__file__).resolve().parent / "import_site"
"""Folder of the sitecustomize.py that spawned processes run."""
CUDA_LIBRARIES = ("libtorch_cuda.so", "libc10_cuda.so")
"""Of torch; a CPU torch has neither, so whatever links to one cannot load beside it."""
HIDDEN = ("torchaudio", "torchcodec")


def mend_imports() -> list[str]:
    """Guard this process and those it spawns against packages that cannot load; their names, none where all is well.

    Enough for a process that imports transformers; vLLM needs `policy.vllm.packages.prepare`.
    """
    broken = unloadable()
    guard(broken)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if broken and str(SITE) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, paths)])
    return broken


def unloadable() -> list[str]:
    """Which of the three packages link to a CUDA torch although torch is another build. Reads files, imports nothing.

    Packages that are loaded already are not among them: they did load.
    """
    torch = _folder("torch")
    if torch is None or (torch / "lib" / CUDA_LIBRARIES[0]).exists():
        return []
    return [
        name
        for name in ("torchvision", *HIDDEN)
        if name not in sys.modules and (folder := _folder(name)) and any(map(_needs_cuda, folder.rglob("*.so")))
    ]


def guard(broken: Sequence[str]) -> None:
    """Guard this process alone."""
    for name in set(broken) & set(HIDDEN):
        # None here makes `import` raise ModuleNotFoundError and importlib.util.find_spec return None
        sys.modules[name] = None  # type: ignore[assignment]
    # by name: a spawned process may have loaded this file twice, and an operator can be declared once
    guarded = any(type(finder).__name__ == _TorchvisionNames.__name__ for finder in sys.meta_path)
    if "torchvision" in broken and not guarded:
        sys.meta_path.insert(0, _TorchvisionNames())


class _TorchvisionNames(MetaPathFinder):
    """Finds nothing; declares torchvision's operators just before the module that refers to them is imported."""

    def __init__(self) -> None:
        self._library: Any = None  # the names live as long as it does

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if fullname == "torchvision._meta_registrations" and self._library is None:
            import torch

            self._library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                self._library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


def _folder(name: str) -> Path | None:
    """Where a package lies; None if it is not installed, or hidden."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _needs_cuda(library: Path) -> bool:
    if library.stat().st_size == 0:
        return False
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(name.encode() + b"\0") >= 0 for name in CUDA_LIBRARIES)
