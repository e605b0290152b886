"""Reads back what the W&B client wrote for an offline run.

A `.wandb` file is a 7-byte header (":W&B", two bytes, version) and then LevelDB's log format: blocks of 32 KiB with
chunks of (checksum u32, length u16, type u8, data), a record being one whole chunk (1) or first (2), middle (3) ...
last (4) chunks. Each record is a protobuf message of W&B's own `wandb_internal_pb2.Record`.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768


def _raw_records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            return
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


class OfflineRun:
    """Of a finished offline run: id, configuration, exit code, history (a dict a W&B step, `_step` among its keys)."""

    def __init__(self, directory: Path) -> None:
        (path,) = directory.glob("run-*.wandb")
        deadline = time.monotonic() + 120
        while not self._read(path):  # W&B's service process may flush the last block after `finish` returns
            assert time.monotonic() < deadline, f"{path} never got its exit record"
            time.sleep(0.05)

    def _read(self, path: Path) -> bool:
        """Whether the run has ended in good order."""
        self.id = ""
        self.project = ""
        self.commit = ""
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.exit_code = 0
        for raw in _raw_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(raw)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.id, self.project, self.commit = record.run.run_id, record.run.project, record.run.git.commit
                self._take_config(record.run.config.update)
            elif kind == "config":
                self._take_config(record.config.update)
            elif kind == "history":
                items = record.history.item
                row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
                row.setdefault("_step", record.history.step.num)
                self.history.append(row)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code
                return True
        return False

    def _take_config(self, items: Any) -> None:
        for item in items:
            self.config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)


def offline_runs(directory: Path) -> list[Path]:
    """Directories that `wandb sync` takes, oldest first."""
    return sorted((directory / "wandb").glob("offline-run-*"))
