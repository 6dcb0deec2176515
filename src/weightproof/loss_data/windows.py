"""A set of windows with labels, kept on disk: memory does not depend on how many there are.

Windows are read once, in the order of the data, without duplicates, into a private temporary SQLite file that the
system removes when it is closed (or the process ends). They are read back in an order that their content
fixes and that is as good as random, document by document: a test that stops early has read a random sample.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from safetensors.torch import load, save

from weightproof.errors import InputError
from weightproof.forward.windows import Item, digest_items
from weightproof.loss_data.items import Form, LossItem

MAX_GROUPS = 4096
# Windows of a batch of work: the same before and after a change, and for every number of processes.
_FIRST_CHUNK, _LARGEST_CHUNK = 32, 64

_SCHEMA = """
create table windows (
    arrival integer primary key, digest blob unique not null, document text,
    num_scored integer not null, content blob not null
);
create table documents (name text primary key, key blob not null) without rowid;
"""
_ORDER = """
create table reading (position integer primary key, arrival integer not null, key blob not null);
insert into reading (arrival, key)
    select arrival, coalesce(key, digest) as key
    from windows left join documents on documents.name = windows.document order by coalesce(key, digest), arrival;
drop table documents;
"""


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Consecutive windows in reading order: the first one's position, the windows, and the group of each."""

    start: int
    items: tuple[LossItem, ...]
    groups: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Position after the last window."""
        return self.start + len(self.items)


class LossWindows:
    """Windows of one role, on disk, in reading order.

    Attributes:
        name: "retain" or "target".
        task: See `loss_items.Form`.
        digest: SHA-256 over task, tokenizer, and inputs and labels of every window in reading order.
        num_windows: Without duplicates.
        num_groups: Documents, or windows where documents are unknown; at most `MAX_GROUPS`, consecutive documents
            are joined beyond.
        num_tokens: Scored tokens; examples where each gives one score.
        num_duplicates: Windows left out because an equal one came before.
        has_documents: Whether there are documents of several windows; those are never torn apart.
    """

    def __init__(
        self, items: Iterator[LossItem], form: Form, *, max_windows: int, tokenizer_digest: str | None
    ) -> None:
        self.name = form.name
        self.task = form.task
        # An empty name is SQLite's private temporary file: unlinked, with a page cache of bounded size.
        self._file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._close = weakref.finalize(self, self._file.close)
        self._file.execute("pragma journal_mode = off")
        self._file.execute("pragma temp_store = file")
        self._file.executescript(_SCHEMA)
        self.num_duplicates = self._take(items, max_windows)
        self._arrange()
        self.digest = self._digest(tokenizer_digest)

    def _take(self, items: Iterator[LossItem], max_windows: int) -> int:
        duplicates = count = 0
        self._file.execute("begin")
        for item in items:
            digest = bytes.fromhex(_digest_of(item))
            row = (digest, item.document, item.num_scored, _packed(item))
            statement = "insert or ignore into windows (digest, document, num_scored, content) values (?, ?, ?, ?)"
            if not self._file.execute(statement, row).rowcount:
                duplicates += 1
                continue
            if item.document is not None:
                self._file.execute("insert or ignore into documents values (?, ?)", (item.document, digest))
            count += 1
            if count >= max_windows:
                break
        self._file.execute("commit")
        if not count:
            raise InputError(f"the {self.name} data has no window: give at least one example with something to score")
        return duplicates

    def _arrange(self) -> None:
        """Fix the reading order, and which consecutive documents make a group."""
        self.num_windows = self._one("select count(*) from windows")
        self.num_tokens = self._one("select sum(num_scored) from windows")
        self.has_documents = 1 < self._one("select count(distinct document) from windows") < self.num_windows
        if not self.has_documents:  # unknown, or one, or one a window: windows are what is exchangeable
            self._file.execute("update windows set document = null")
            self._file.execute("delete from documents")
        self._file.executescript(_ORDER)
        distinct = self._one("select count(distinct key) from reading")
        self._documents_per_group = -(-distinct // MAX_GROUPS)
        self.num_groups = -(-distinct // self._documents_per_group)

    def _digest(self, tokenizer_digest: str | None) -> str:
        digest = hashlib.sha256(f"loss windows\n{self.task}\n{tokenizer_digest}\n".encode())
        for (one,) in self._file.execute("select digest from reading join windows using (arrival) order by position"):
            digest.update(one)
        return digest.hexdigest()

    def _one(self, query: str) -> int:
        return int(self._file.execute(query).fetchone()[0])

    def chunks(self) -> Iterator[Chunk]:
        """All windows in reading order, in pieces whose sizes depend on nothing."""
        query = "select key, content, num_scored, document from reading join windows using (arrival) order by position"
        with closing(self._file.cursor()) as cursor:
            rows = cursor.execute(query)
            start, size, document, last = 0, _FIRST_CHUNK, -1, b""
            while part := list(itertools.islice(rows, size)):
                groups: list[int] = []
                for key, *_ in part:
                    document, last = document + (key != last), key
                    groups.append(document // self._documents_per_group)
                items = tuple(_unpacked(content, scored, name) for _, content, scored, name in part)
                yield Chunk(start, items, tuple(groups))
                start += len(part)
                size = min(_LARGEST_CHUNK, start)

    def first(self, count: int) -> list[Item]:
        """The first windows in the order of the data, with their labels: what a one-shot iterable began with."""
        rows = self._file.execute(
            "select content, num_scored, document from windows order by arrival limit ?", (count,)
        )
        return [_with_labels(_unpacked(*row)) for row in rows.fetchall()]

    def close(self) -> None:
        """Give the disk space back."""
        self._close()


def _digest_of(item: LossItem) -> str:
    return digest_items([_with_labels(item)])


def _with_labels(item: LossItem) -> Item:
    return item.inputs if item.labels is None else {**item.inputs, "labels": item.labels}


def _packed(item: LossItem) -> bytes:
    return save(
        {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in _with_labels(item).items()}
    )


def _unpacked(content: bytes, num_scored: int, document: str | None) -> LossItem:
    inputs = load(content)
    labels = inputs.pop("labels", None)
    return LossItem(inputs, labels, num_scored, document)
