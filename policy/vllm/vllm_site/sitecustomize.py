"""Run by Python at the start of every process that `policy.vllm.packages.mend_imports` reaches through PYTHONPATH.

Guards that process in the same way, then gives way to the sitecustomize that this one hides, if there is any.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).resolve().parent


def _load(spec: ModuleSpec) -> ModuleType:
    module = sys.modules[spec.name] = module_from_spec(spec)
    assert spec.loader is not None  # both are files
    spec.loader.exec_module(module)
    return module


def _guard() -> None:
    # by its path: this process may not have our packages on its own
    spec = spec_from_file_location("_shoal_vllm_packages", _HERE.parent / "packages.py")
    assert spec is not None
    packages = _load(spec)
    packages.guard(packages.unloadable())


def _give_way() -> None:
    others = [path for path in sys.path if Path(path).resolve() != _HERE]
    if spec := PathFinder.find_spec("sitecustomize", others):
        _load(spec)


_guard()
_give_way()
