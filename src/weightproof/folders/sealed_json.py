"""JSON files that carry their own digest, in one form only: any bit that is changed later is found.

The form is that of `json.dumps`: numbers come back as they were (a float to the last bit, an integer of any size), and
what is written again from what was read is the same text, or the file was altered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_DIGEST = "digest"


def json_text_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over the JSON text."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def seal(content: Mapping[str, Any], *, allow_nan: bool = True) -> bytes:
    """The text of a JSON object with its digest as the last entry, `digest`.

    Raises:
        ValueError: If it holds NaN or infinity, which few other readers of JSON know, and they are not allowed.
    """
    return json.dumps({**content, _DIGEST: json_text_digest(content)}, allow_nan=allow_nan).encode()


def open_sealed(text: bytes) -> dict[str, Any] | None:
    """The object without its digest; None if that is not the text that `seal` gave.

    Raises:
        ValueError: If the text is no JSON object.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    content = {name: value for name, value in found.items() if name != _DIGEST}
    return content if seal(content) == text else None
