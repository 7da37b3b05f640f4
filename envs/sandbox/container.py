"""A container as a sandbox: `container:IMAGE` runs each zygote in a fresh one, through docker or podman.

The image needs `python3` (3.11 or later) and nothing else. It is never pulled here.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from envs.sandbox.boot import BOOT, ENVIRONMENT, FLAGS
from envs.sandbox.limits import CONTAINER_BYTES, SandboxUnavailable

ENGINES = ("podman", "docker")


def command_for(image: str) -> Callable[[str, Path], list[str]]:
    """The command line that starts a zygote in a container of `image`."""

    def command(settings: str, folder: Path) -> list[str]:
        program = next(filter(None, map(shutil.which, ENGINES)), None)
        if program is None:
            raise SandboxUnavailable(f"none of {', '.join(ENGINES)} is installed")
        words = [program, "run", "--rm", "--interactive", "--pull", "never", "--network", "none", "--read-only"]
        words += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "65534:65534"]
        words += ["--pids-limit", "64", "--memory", str(CONTAINER_BYTES), "--tmpfs", "/tmp:rw,size=64m,mode=1777"]
        words += ["--volume", f"{Path(__file__).resolve().parents[1]}:/shoal/envs:ro", "--workdir", "/tmp"]
        words += [word for name, value in ENVIRONMENT.items() for word in ("--env", f"{name}={value}")]
        return [*words, "--entrypoint", "python3", image, *FLAGS, "-c", BOOT, "/shoal", settings]

    return command
