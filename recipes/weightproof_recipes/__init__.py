"""The procedures of weightproof as data: one YAML file each.

`shipped()` lists them by name; the library finds it through the entry point group
`weightproof.recipes`. `launch_config()` finds the configurations for `accelerate launch`, which
`python -m weightproof_recipes NAME` prints the path of.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from weightproof.errors import InputError


def shipped() -> dict[str, Traversable]:
    """Shipped recipes by name: each value is a readable YAML file."""
    return _yaml_files(files("weightproof_recipes"))


def launch_configs() -> tuple[str, ...]:
    """Names of the shipped configurations for `accelerate launch`."""
    return tuple(sorted(_yaml_files(files("weightproof_recipes") / "accelerate")))


def launch_config(name: str) -> Path:
    """Path of a shipped configuration, for `accelerate launch --config_file`.

    Args:
        name: "cpu_x2", "multi_gpu_ddp", "fsdp2" or "zero3".

    Raises:
        InputError: If there is none of that name.
    """
    if name not in launch_configs():
        raise InputError(f"no launch configuration {name!r}; there are {', '.join(launch_configs())}")
    return Path(str(files("weightproof_recipes") / "accelerate" / f"{name}.yaml"))


def _yaml_files(folder: Traversable) -> dict[str, Traversable]:
    return {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}
