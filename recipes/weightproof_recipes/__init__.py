"""The procedures of weightproof as data: one YAML file each.

`shipped()` lists them by name; the library finds it through the entry point group
`weightproof.recipes`.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable


def shipped() -> dict[str, Traversable]:
    """Shipped recipes by name: each value is a readable YAML file."""
    return {
        item.name.removesuffix(".yaml"): item
        for item in files("weightproof_recipes").iterdir()
        if item.name.endswith(".yaml")
    }
