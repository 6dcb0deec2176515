"""Read an offline W&B run (`run-<id>.wandb`) without a server.

Format: a 7-byte header `<4sHB` (":W&B", 0xBEE1, version), then LevelDB log framing: blocks of 32 KiB, each chunk
`<IHB` (crc, length, type 1 full / 2 first / 3 middle / 4 last) followed by its bytes of one protobuf `Record`.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEADER = struct.Struct("<4sHB")
_CHUNK = struct.Struct("<IHB")
_BLOCK = 32 * 1024
_FULL, _FIRST, _LAST = 1, 2, 4


@dataclass
class OfflineRun:
    """What one run recorded. `history` keys are joined with `/`; values are decoded JSON."""

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[Any] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    alerts: list[Any] = field(default_factory=list)
    exited: bool = False

    def rows_with(self, key: str) -> list[dict[str, Any]]:
        return [row for row in self.history if any(name == key or name.startswith(f"{key}/") for name in row)]

    def table(self, row: dict[str, Any], key: str) -> dict[str, Any]:
        return json.loads(self.media(row, key))

    def media(self, row: dict[str, Any], key: str) -> bytes:
        """The file behind a table or an image; its description is stored flat, as `<key>/path`."""
        return (self.folder / "files" / row[f"{key}/path"]).read_bytes()


def read_offline_run(root: Path, timeout: float = 20.0) -> OfflineRun:
    """Decode the only run under `root/wandb`; polls until its exit record is on disk (finish() may return before)."""
    folders = sorted((root / "wandb").glob("offline-run-*"))
    assert len(folders) == 1, f"expected one run, found {[folder.name for folder in folders]}"
    (path,) = folders[0].glob("run-*.wandb")
    deadline = time.monotonic() + timeout
    run = _decode(path)
    while not run.exited and time.monotonic() < deadline:
        time.sleep(0.01)
        run = _decode(path)
    assert run.exited, f"{path.name} holds no exit record after {timeout:.0f} s"
    return run


def records(content: bytes) -> Iterator[Any]:
    """Protobuf records in order; a torn tail ends the iteration."""
    from wandb.proto import wandb_internal_pb2

    if len(content) < _HEADER.size:
        return
    magic, number, _version = _HEADER.unpack_from(content)
    assert (magic, number) == (b":W&B", 0xBEE1), "not an offline W&B run file"
    position, pending = _HEADER.size, b""
    while position + _CHUNK.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK.size:
            position += left
            continue
        _crc, length, kind = _CHUNK.unpack_from(content, position)
        if kind == 0 and length == 0:
            position += left
            continue
        chunk = content[position + _CHUNK.size : position + _CHUNK.size + length]
        if len(chunk) < length:
            return
        position += _CHUNK.size + length
        pending = chunk if kind in (_FULL, _FIRST) else pending + chunk
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            yield record


def _decode(path: Path) -> OfflineRun:
    run = OfflineRun(path.parent)
    for record in records(path.read_bytes()):
        match record.WhichOneof("record_type"):
            case "history":
                run.history.append(_items(record.history.item))
            case "summary":
                run.summary.update(_items(record.summary.update))
            case "metric":
                run.metrics.append(record.metric)
            case "artifact":
                run.artifacts.append(record.artifact)
            case "request" if record.request.WhichOneof("request_type") == "log_artifact":
                run.artifacts.append(record.request.log_artifact.artifact)
            case "alert":
                run.alerts.append(record.alert)
            case "exit":
                run.exited = True
    return run


def _items(items: Any) -> dict[str, Any]:
    """Items to a flat dict: the parts of `nested_key` joined with `/`."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
