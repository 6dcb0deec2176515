"""YAML as plain values: mappings, lists, text, numbers. Nothing is built that could run, and no key counts twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, cast

import yaml

from weightproof.errors import InputError

# What people write by hand is a few kilobytes.
_MAX_CHARACTERS = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML without repeated keys: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping, refusing a key that occurs twice."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise InputError(f"key {key!r} is written twice, the second time in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, origin: str) -> object:
    """The plain value that a YAML text stands for.

    Args:
        text: YAML.
        origin: Where it comes from, for errors.

    Raises:
        InputError: If it is no YAML, asks for an object of a language, or holds a key twice.
    """
    if len(text) > _MAX_CHARACTERS:
        raise InputError(f"{origin} is longer than {_MAX_CHARACTERS} characters: is it another file?")
    try:
        # _Loader is a SafeLoader: it builds plain values only.
        return cast("object", yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{origin} is not valid YAML{place}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise InputError(f"{origin} is not valid YAML: it is nested too deeply") from error
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error
