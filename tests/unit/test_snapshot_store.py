"""Snapshots on disk: what is kept, what is shared, what is pruned, and that nothing a disk does loses the old one."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import random
import signal
import time

import crash_cases
import pytest
import torch
from fault_disks import (
    DISK_FAULTS,
    QUICK,
    DyingDisk,
    FailingDisk,
    ForgetfulDisk,
    Killed,
    QuickDisk,
    after_restart,
    copy_of,
    files_of,
    flip,
    is_exact,
    save_steps,
    snapshot_is_damaged,
    tensors_at,
    values_at,
)
from safetensors import safe_open
from thread_ranks import run_ranks
from worlds import run_world

from weightproof.collective import Processes
from weightproof.errors import CollectiveError, InputError, RestoreError, SnapshotError
from weightproof.folders.files import write_atomically
from weightproof.parallel.placements import local_of
from weightproof.snapshot import Snapshot
from weightproof.snapshots.store import SnapshotFolder
from weightproof.snapshots.store_lock import LOCK_FILE
from weightproof.snapshots.tensor_files import object_name
from weightproof.snapshots.tensor_store import same_bits

RANK = "rank-0000-of-0001"


def opened(path, **options):
    return SnapshotFolder(path, files=options.pop("files", QUICK), **options)


def objects_of(path):
    return {found.name for found in path.rglob("*.safetensors")}


# ---------------------------------------------------------------- what is kept


def test_a_fresh_folder_has_nothing_and_what_is_saved_comes_back(tmp_path):
    with opened(tmp_path / "deep" / "run") as folder:
        assert folder.opened.ids == ()
        assert folder.latest() is None
        number = folder.save(7, tensors_at(7), values_at(7))
        saved = folder.latest()
        assert (saved.id, saved.step) == (number, 7)
        assert is_exact(saved)
    with opened(tmp_path / "deep" / "run") as folder:
        assert folder.opened.ids == (number,)
        assert (folder.opened.step, folder.opened.removed, folder.opened.damaged) == (7, (), ())
        assert folder.load(number).digest == saved.digest


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
]


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4)])
def test_every_dtype_comes_back_bit_for_bit_and_other_readers_can_read_the_files(tmp_path, shape):
    tensors = {}
    for dtype in DTYPES:
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
        tensors[str(dtype)] = raw.view(dtype).reshape(shape)
    with opened(tmp_path) as folder:
        folder.save(1, tensors)
        found = folder.latest().tensors
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bytes(found[name].reshape(-1).view(torch.uint8)) == bytes(tensor.reshape(-1).view(torch.uint8))
    (path,) = tmp_path.rglob("*.safetensors")
    with safe_open(path, framework="pt") as handle:
        theirs = [handle.get_tensor(name) for name in handle.keys()]  # noqa: SIM118 - not a mapping
    assert {(tensor.dtype, tuple(tensor.shape)) for tensor in theirs} == {(dtype, shape) for dtype in DTYPES}


def test_strided_expanded_and_negated_tensors_are_kept_by_value(tmp_path):
    base = torch.randn(6, 4)
    tensors = {"t": base.t(), "wide": torch.tensor([[1.0]]).expand(3, 5), "conj": torch.randn(3, dtype=torch.cfloat)}
    tensors["conj"] = tensors["conj"].conj()
    with opened(tmp_path) as folder:
        folder.save(1, tensors)
        found = folder.latest().tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_are_alike_do_not_share_memory_when_they_come_back(tmp_path):
    with opened(tmp_path) as folder:
        folder.save(
            1, {"small": torch.zeros(3), "twin": torch.zeros(3), "a": torch.ones(9000, 9), "b": torch.ones(9000, 9)}
        )
        found = folder.latest().tensors
    found["small"].add_(1)
    found["a"].add_(1)
    assert not found["twin"].any()
    assert (found["b"] == 1).all()
    assert len(objects_of(tmp_path)) == 2


def test_later_changes_of_the_callers_values_are_not_kept(tmp_path):
    values = {"rates": [0.1]}
    with opened(tmp_path) as folder:
        folder.save(1, {}, values)
        values["rates"].append(0.2)
        assert folder.latest().values == {"rates": [0.1]}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"state": {0: 1}}, r"values\['state'\] has the key 0"),
        ({"rng": torch.zeros(1)}, r"values\['rng'\] is a Tensor.*hand it in as a tensor"),
        ({"a": [{"b": {1, 2}}]}, r"values\['a'\]\[0\]\['b'\] is a set"),
    ],
)
def test_values_that_json_would_change_are_refused_by_name(tmp_path, values, words):
    with opened(tmp_path) as folder:
        with pytest.raises(SnapshotError, match=words):
            folder.save(1, {}, values)
        assert folder.ids == ()


def test_a_dtype_that_safetensors_does_not_know_is_refused_by_name(tmp_path):
    with opened(tmp_path) as folder, pytest.raises(SnapshotError, match=r"phase has dtype torch.complex128"):
        folder.save(1, {"phase": torch.zeros(2, dtype=torch.complex128)})


# ---------------------------------------------------------------- sharing and pruning


def test_what_did_not_change_is_stored_once(tmp_path):
    with opened(tmp_path, keep=10) as folder:
        folder.save(1, tensors_at(1))
        first = objects_of(tmp_path)
        folder.save(2, tensors_at(1), {"only": "values"})
        assert objects_of(tmp_path) == first
        folder.save(3, {**tensors_at(1), "norm": torch.full((16,), 2.0)})
        (added,) = objects_of(tmp_path) - first
        assert next(tmp_path.rglob(added)).stat().st_size < 300, "only the small tensor that changed"
        folder.save(4, tensors_at(4))
        assert len(objects_of(tmp_path)) == len(first) + 1 + 3, "two large ones and the small ones that changed"
        assert torch.equal(folder.load(3).tensors["norm"], torch.full((16,), 2.0))


def test_a_shared_file_that_is_gone_or_cut_is_written_again(tmp_path):
    with opened(tmp_path) as folder:
        folder.save(1, tensors_at(1), values_at(1))
        for found in tmp_path.rglob("*.safetensors"):
            found.write_bytes(found.read_bytes()[:50])
        folder.save(1, tensors_at(1), values_at(1))
        assert is_exact(folder.latest())


def test_only_the_newest_are_kept_and_their_numbers_only_grow(tmp_path):
    with opened(tmp_path, keep=2) as folder:
        save_steps(folder, range(1, 6))
        assert folder.ids == (4, 5)
        assert [is_exact(folder.load(number)) for number in folder.ids] == [True, True]
    with opened(tmp_path, keep=1) as folder:
        assert folder.ids == (4, 5)
        assert folder.prune() == (4,)
        assert folder.prune() == ()
        assert is_exact(folder.latest())
        assert folder.save(6, tensors_at(6)) == 6


def test_pruning_removes_the_files_that_nothing_needs_and_no_other(tmp_path):
    with opened(tmp_path, keep=1) as folder:
        save_steps(folder, (1,))
        theirs = tmp_path / RANK / "objects" / "notes.txt"
        theirs.write_text("the user's own")
        save_steps(folder, (2,))
        assert theirs.exists()
    manifest = json.loads((tmp_path / RANK / "snapshots" / "00000002.json").read_bytes())
    assert len(objects_of(tmp_path)) == len(manifest["objects"])
    assert after_restart(tmp_path, keep=1) == 2


def test_a_budget_counts_shared_files_once_and_never_prunes_the_newest(tmp_path):
    frozen, moving = torch.randn(200, 200), torch.zeros(100, 200)
    size = frozen.nbytes + moving.nbytes
    with opened(tmp_path, keep=9, budget=size + 2 * moving.nbytes + 5000) as folder:
        for step in range(5):
            folder.save(step, {"frozen": frozen, "moving": moving + step})
        assert folder.ids == (3, 4, 5), "one frozen and three moving tensors fit"
        with pytest.raises(SnapshotError, match=r"a snapshot of .* is larger than the budget of .*raise the budget"):
            folder.save(9, {"frozen": frozen + 1, "moving": torch.zeros(300, 300)})
        assert folder.ids == (3, 4, 5)
        folder.save(9, {"frozen": frozen + 1, "moving": moving})
        assert folder.ids[-1] == 6
        folder.budget = 1
        folder.prune()
        assert folder.ids == (6,)
        assert torch.equal(folder.latest().tensors["frozen"], frozen + 1)


@pytest.mark.parametrize("options", [{"keep": 0}, {"budget": 0}])
def test_limits_that_keep_nothing_are_refused(tmp_path, options):
    with pytest.raises(InputError, match="at least 1"):
        opened(tmp_path, **options)


# ---------------------------------------------------------------- damage


def test_an_unknown_number_is_refused_with_those_that_are_there(tmp_path):
    with opened(tmp_path) as folder:
        with pytest.raises(InputError, match=r"has no snapshot 3; it has no snapshot"):
            folder.load(3)
        save_steps(folder, (1, 2))
        with pytest.raises(InputError, match=r"has no snapshot 3; it has snapshots 1, 2"):
            folder.load(3)


def test_a_damaged_newest_snapshot_is_named_and_the_newest_undamaged_one_is_given(tmp_path, caplog):
    with opened(tmp_path, keep=3) as folder:
        save_steps(folder, (1, 2, 3))
    kept = files_of(tmp_path)
    newest = tmp_path / RANK / "snapshots" / "00000003.json"
    newest.write_bytes(newest.read_bytes().replace(b'"step": 3', b'"step": 4'))
    with opened(tmp_path, keep=3) as folder:
        assert (folder.opened.damaged, folder.opened.step, folder.opened.removed) == ((3,), None, ())
        assert "00000003.json was altered" in caplog.text
        with pytest.raises(
            RestoreError, match=r"snapshot 3 cannot be used: .*00000003\.json was altered.*snapshots 1, 2"
        ):
            folder.load(3)
        assert objects_of(tmp_path) == {name.rpartition("/")[2] for name in kept if "objects" in name}
        found = folder.latest()
        assert is_exact(found)
        assert found.id == 2
        assert "snapshot 3 is damaged and is passed over; snapshot 2 (step 2) is used in its place" in caplog.text
        assert newest.exists(), "nothing is removed before something newer is saved"
        assert folder.save(4, tensors_at(4), values_at(4)) == 4, "a damaged number is not used again"
        assert (folder.ids, newest.exists()) == ((1, 2, 4), False)
        assert is_exact(folder.latest())


def test_a_damaged_file_is_written_again_when_the_run_comes_to_the_same_tensor_once_more(tmp_path):
    with opened(tmp_path) as folder:
        save_steps(folder, (1, 2))
        only_newest = objects_of(tmp_path) - objects_of_snapshot(folder, 1)
        for name in only_newest:
            (path,) = tmp_path.rglob(name)
            flip(path, 8 * path.stat().st_size - 1)
    with opened(tmp_path) as folder:
        assert folder.latest().id == 1
        assert folder.save(2, tensors_at(2), values_at(2)) == 3
        assert is_exact(folder.latest())
        assert folder.latest().id == 3


def test_where_every_snapshot_is_damaged_none_is_given_and_none_removed(tmp_path):
    with opened(tmp_path) as folder:
        save_steps(folder, (1, 2))
        for path in tmp_path.rglob("*.safetensors"):
            flip(path, 8 * path.stat().st_size - 1)
        kept = files_of(tmp_path)
        with pytest.raises(RestoreError, match=r"no snapshot in .* can be used: snapshot 2 .*; snapshot 1 cannot be"):
            folder.latest()
        assert (folder.ids, files_of(tmp_path)) == ((1, 2), kept)


def test_tensors_are_read_one_by_one_and_each_is_proven(tmp_path):
    with opened(tmp_path) as folder:
        save_steps(folder, (1,))
        expected, found = tensors_at(1), folder.tensors(1)
        assert found.digests.keys() == expected.keys()
        for name, tensor in expected.items():
            assert same_bits(found.read(name), local_of(tensor).contiguous())
        folder.verify(1)
        largest = max(tmp_path.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
        flip(largest, 8 * largest.stat().st_size - 1)
        with pytest.raises(RestoreError, match="was altered after it was written"):
            folder.verify(1)
        damaged = folder.tensors(1)
        with pytest.raises(RestoreError, match="was altered after it was written"):
            [damaged.read(name) for name in expected]
        with pytest.raises(InputError, match="has no snapshot 7"):
            folder.tensors(7)


def objects_of_snapshot(folder, number):
    """File names of what a snapshot of this folder needs."""
    return {object_name(held) for held in folder._kept[number].objects}


@pytest.mark.parametrize("how", ["gone", "cut", "longer", "exchanged"])
def test_a_damaged_object_is_named(tmp_path, how):
    with opened(tmp_path) as folder:
        save_steps(folder, (1,))
        path, other = sorted(tmp_path.rglob("*.safetensors"), key=lambda found: found.stat().st_size)[-2:]
        content = path.read_bytes()
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes({"cut": content[:-1], "longer": content + b"\0", "exchanged": other.read_bytes()}[how])
        with pytest.raises(RestoreError, match=rf"snapshot 1 cannot be used: .*{path.name} .*no snapshot"):
            folder.latest()


def test_a_manifest_of_another_snapshot_is_refused(tmp_path):
    with opened(tmp_path) as folder:
        save_steps(folder, (1, 2))
        manifests = tmp_path / RANK / "snapshots"
        (manifests / "00000002.json").write_bytes((manifests / "00000001.json").read_bytes())
        with pytest.raises(RestoreError, match=r"00000002\.json is of snapshot 1"):
            folder.load(2)
    with opened(tmp_path) as folder:
        assert folder.opened.damaged == (2,)


# ---------------------------------------------------------------- the lock


def test_a_second_run_is_refused_and_told_who_has_the_folder(tmp_path):
    with opened(tmp_path) as folder:
        with pytest.raises(SnapshotError, match=rf"in use by another run \(process {os.getpid()} on .*, since 2"):
            opened(tmp_path)
        (tmp_path / LOCK_FILE).write_bytes(b"\xff{")
        with pytest.raises(SnapshotError, match="in use by another run"):
            opened(tmp_path)
        save_steps(folder, (1,))
    with opened(tmp_path) as folder:
        assert is_exact(folder.latest())
    with pytest.raises(SnapshotError, match="was closed"):
        folder.save(2, {})


def test_a_dead_holder_and_the_forked_child_of_a_live_one_hold_no_lock(tmp_path):
    def hold():
        held = opened(tmp_path)
        assert held.ids == ()
        if crash_cases._forked(lambda: time.sleep(60)):  # a worker that outlives its parent
            (tmp_path / "ready").touch()
            time.sleep(60)

    child = crash_cases._forked(hold)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with pytest.raises(SnapshotError, match=rf"process {child} on"):
        opened(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    opened(tmp_path).close()


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def refuse(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(SnapshotError, match=r"has no locks \(flock: No locks available\).*another file system"):
        opened(tmp_path)


def test_snapshots_in_scratch_folders_are_swept_once_their_process_was_killed(tmp_path, caplog):
    theirs = tmp_path / "snapshot-of-the-user"
    theirs.mkdir()

    def capture_and_wait():
        kept = [Snapshot.capture(torch.nn.Linear(3, 3), tmp_path) for _ in range(2)]
        (tmp_path / "ready").touch()
        time.sleep(60)
        assert kept

    child = crash_cases._forked(capture_and_wait)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    (tmp_path / "ready").unlink()
    living = Snapshot.capture(torch.nn.Linear(3, 3), tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3, "nothing of a living process is removed"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    second = Snapshot.capture(torch.nn.Linear(3, 3), tmp_path)
    assert "removed 2 snapshots that killed processes left" in caplog.text
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    living.restore()
    second.restore()
    living.discard()
    second.discard()
    assert list(tmp_path.iterdir()) == [theirs]


# ---------------------------------------------------------------- disks that fail


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return crash_cases.base_folder(tmp_path_factory.mktemp("snapshots") / "base")


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("fault", DISK_FAULTS)
def test_a_disk_fault_at_any_call_keeps_the_old_snapshots_and_leaves_nothing(base, tmp_path, fault, stays, caplog):
    work = tmp_path / "work"
    start, calls = crash_cases.calls_of_a_save(base, work)
    before = files_of(base)
    committing = start + calls.index("unlink") - 1
    for at in range(start, start + len(calls)):
        disk = FailingDisk(at, DISK_FAULTS[fault], stays=stays)
        with opened(copy_of(base, work), files=disk) as folder:
            if at < start + calls.index("unlink"):
                with pytest.raises(
                    SnapshotError, match=f"cannot write in .*: .*{fault}.*the snapshots saved before are kept"
                ) as caught:
                    save_steps(folder, (3,))
                assert "\n" not in str(caught.value)
                assert folder.ids == (1, 2)
                if stays and at == committing:  # the manifest may come back if the power fails now, and needs its parts
                    assert {name: content for name, content in files_of(work).items() if name in before} == before
                else:
                    assert files_of(work) == before
            else:
                save_steps(folder, (3,))
                assert "snapshot 3 was saved, but older ones could not be removed" in caplog.text
                assert folder.latest().step == 3
            if not stays:
                save_steps(folder, (4,))
                assert is_exact(folder.latest())
            newest = folder.latest().step
        assert after_restart(work) == newest


class Unsure(ForgetfulDisk):
    """From a moment on no folder can be synced, and then the power fails."""

    fails = False

    def sync_folder(self, folder):
        if self.fails and folder.name == "snapshots":
            raise OSError(errno.EIO, "Input/output error")
        super().sync_folder(folder)


def test_power_lost_after_a_commit_that_failed_leaves_the_old_or_the_new(base, tmp_path):
    work = copy_of(base, tmp_path / "work")
    disk = Unsure.of(work)
    with opened(work, files=disk) as folder:
        disk.fails = True
        for step in (3, 4):  # the second save first clears up what the first one left
            with pytest.raises(SnapshotError, match="input/output error"):
                save_steps(folder, (step,))
            assert folder.latest().step == 2
    numbers = random.Random(8)
    found = [after_restart(disk.after_power_loss(tmp_path / f"found{number}", numbers)) for number in range(30)]
    assert set(found) == {2, 3}


class NoRemoval(FailingDisk):
    """The disk fails, and gives nothing back either."""

    def before(self, kind):
        if len(self.calls) > self.at:
            raise OSError(self.number, os.strerror(self.number))


def test_what_cannot_be_removed_after_a_fault_is_swept_before_the_next_save(base, tmp_path):
    work = tmp_path / "work"
    start, calls = crash_cases.calls_of_a_save(base, work)
    for at in range(start, start + calls.index("unlink")):
        disk = NoRemoval(at, errno.EIO)
        with opened(copy_of(base, work), files=disk) as folder:
            with pytest.raises(SnapshotError, match="input/output error"):
                save_steps(folder, (3,))
            assert folder.latest().step == 2
            disk.at = 10**6
            save_steps(folder, (4,))
            assert folder.latest().step == 4
            assert folder.prune() == ()
            left = files_of(work)
        assert not [name for name in left if name.endswith(".part")]
        assert after_restart(work) == 4


def test_too_little_room_is_said_before_anything_is_written(base, tmp_path):
    class Narrow(QuickDisk):
        def free_bytes(self, folder):
            return 1000

    with opened(copy_of(base, tmp_path / "work"), files=Narrow()) as folder:
        with pytest.raises(SnapshotError, match=r"no room for a snapshot in .* are needed and 1000 B are free"):
            save_steps(folder, (3,))
        assert files_of(tmp_path / "work") == files_of(base)


def test_a_folder_removed_or_replaced_meanwhile_is_said(base, tmp_path):
    work = copy_of(base, tmp_path / "work")
    with opened(work) as folder:
        copy_of(base, work)
        for change in (lambda: save_steps(folder, (3,)), folder.prune):
            with pytest.raises(SnapshotError, match="removed or replaced while the run used it"):
                change()
        assert files_of(work) == files_of(base)
    with opened(work) as folder:
        for found in sorted((work / RANK).rglob("*"), reverse=True):
            found.rmdir() if found.is_dir() else found.unlink()
        with pytest.raises(SnapshotError, match=r"cannot read in .*: the folder or a file in it is gone"):
            save_steps(folder, (3,))


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_refused_when_it_is_opened(tmp_path, number):
    with pytest.raises(SnapshotError, match=r"cannot use .*run for snapshots"):
        opened(tmp_path / "run", files=FailingDisk(0, number, stays=True))
    (tmp_path / "file").touch()
    with pytest.raises(SnapshotError, match=r"cannot use .*file.* for snapshots"):
        opened(tmp_path / "file" / "run")
    with pytest.raises(SnapshotError, match=r"cannot use .*file.* for snapshots"):
        opened(tmp_path / "file")


def test_an_error_that_is_no_disks_leaves_nothing_either(base, tmp_path):
    class Interrupted(QuickDisk):
        def rename(self, source, target):
            raise KeyboardInterrupt

    work = copy_of(base, tmp_path / "work")
    with opened(work, files=Interrupted()) as folder, pytest.raises(KeyboardInterrupt):
        save_steps(folder, (3,))
    with opened(work) as folder:
        assert folder.opened.ids == (1, 2)
        assert len(folder.opened.removed) == 1, "the temporary file"
        assert files_of(work) == files_of(base)


def test_write_atomically_keeps_the_old_content_whatever_call_fails(tmp_path):
    path = tmp_path / "file"
    for at in range(5):
        path.write_bytes(b"old")
        with pytest.raises(InputError, match=r"cannot write .*file.*the old content, if any, is kept"):
            write_atomically(path, b"new", FailingDisk(at, errno.EIO))
        assert path.read_bytes() == (b"new" if at == 4 else b"old"), "only the last sync comes after the rename"
        assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- processes that die, and power that fails


def test_a_process_killed_at_any_call_leaves_the_old_or_the_new(base, tmp_path):
    cases, good = crash_cases.killed_at_every_call(base, tmp_path / "work")
    assert cases == good > 20


def test_a_process_killed_while_it_clears_up_leaves_the_old_or_the_new(base, tmp_path):
    cases, good = crash_cases.killed_twice(base, tmp_path / "work", 0.05, random.Random(3))
    assert cases == good > 5


def test_a_process_killed_at_random_leaves_the_last_returned_or_the_next(tmp_path):
    assert crash_cases.killed_at_random(tmp_path / "run", 20, random.Random(1), longest=0.03) == (20, 20)


def test_what_was_not_synced_may_be_lost_at_any_call(base, tmp_path):
    cases, good = crash_cases.power_lost(base, tmp_path / "work", 1, random.Random(2))
    assert cases == good > 20


@pytest.mark.parametrize("forgotten", ["sync", "sync_folder"])
def test_the_simulated_loss_of_power_finds_a_missing_sync(base, tmp_path, forgotten, monkeypatch):
    monkeypatch.setattr(ForgetfulDisk, forgotten, lambda self, where: None)
    with pytest.raises((RestoreError, AssertionError)):  # some try finds it
        for seed in range(20):
            cases, good = crash_cases.power_lost(base, tmp_path / "work", 1, random.Random(seed))
            assert cases == good


def test_leftovers_are_removed_and_told(base, tmp_path, caplog):
    work = copy_of(base, tmp_path / "work")
    start, calls = crash_cases.calls_of_a_save(base, work)
    with (
        pytest.raises(Killed),
        opened(copy_of(base, work), files=DyingDisk(start + calls.index("sync_folder"))) as folder,
    ):
        save_steps(folder, (3,))
    with opened(work) as folder:
        assert len(folder.opened.removed) == 3
        assert all(name.startswith("objects/") for name in folder.opened.removed)
        assert "removed 3 files that an interrupted save left; the newest snapshot is 2 (step 2)" in caplog.text
        assert files_of(work) == files_of(base)


# ---------------------------------------------------------------- bits that flip


def test_a_flipped_bit_anywhere_in_a_snapshot_is_found(base, tmp_path):
    logging.getLogger("weightproof").setLevel(logging.CRITICAL)
    work = copy_of(base, tmp_path / "work")
    files = [path for path in work.rglob("*") if path.is_file() and path.name != LOCK_FILE]
    headers = [path for path in files if path.suffix == ".json"]
    try:
        for chosen in (files, headers):
            assert crash_cases.flips(chosen, lambda: snapshot_is_damaged(work), 25, random.Random(4)) == (25, 25)
        for path in files:  # the length and the beginning of each header
            for bit in random.Random(5).sample(range(8 * 120), 8):
                flip(path, bit)
                assert snapshot_is_damaged(work)
                flip(path, bit)
    finally:
        logging.getLogger("weightproof").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def state_folder(tmp_path_factory):
    return crash_cases.guard_state_folder(tmp_path_factory.mktemp("state"))


@pytest.mark.parametrize("name", ["guard_state.json", "guard_baseline.safetensors", "guard_current.safetensors"])
def test_a_flipped_bit_anywhere_in_the_guards_state_is_found(state_folder, name):
    def is_damaged():
        return crash_cases.guard_state_is_damaged(state_folder)

    assert crash_cases.flips([state_folder / name], is_damaged, 50, random.Random(6)) == (50, 50)


# ---------------------------------------------------------------- many processes


def rank_tensors(rank, step):
    return {"shared": torch.arange(20000.0), "own": torch.full((150, 130), 100.0 * step + rank)}


def saving(path, disks=None, steps=(1, 2), **options):
    def body(processes):
        files = disks[processes.rank] if disks else QUICK
        with opened(path, processes=processes, files=files, **options) as folder:
            for step in steps:
                folder.save(step, rank_tensors(processes.rank, step), {"rank": processes.rank})
            return folder.ids

    return body


def reading(path):
    def body(processes):
        with opened(path, processes=processes) as folder:
            found = folder.latest()
            if found is None:
                return None, folder.ids
            expected = rank_tensors(processes.rank, found.step)
            assert found.values == {"rank": processes.rank}
            assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())
            return found.step, folder.ids

    return body


def test_ranks_commit_together_and_find_the_same_snapshot(tmp_path):
    assert run_ranks(3, saving(tmp_path)) == [(1, 2)] * 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        *("rank-0000-of-0003", "rank-0001-of-0003", "rank-0002-of-0003")
    ]
    main = json.loads((tmp_path / "rank-0000-of-0003" / "snapshots" / "00000002.json").read_bytes())
    for rank in (1, 2):
        other = json.loads((tmp_path / f"rank-{rank:04d}-of-0003" / "snapshots" / "00000002.json").read_bytes())
        assert main["others"][rank] == other["digest"]
    assert run_ranks(3, reading(tmp_path)) == [(2, (1, 2))] * 3


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_at_any_call_leaves_all_ranks_the_same_snapshot(tmp_path, victim):
    first = tmp_path / "first"
    run_ranks(2, saving(first))
    counting = [DyingDisk(10**6), DyingDisk(10**6)]
    run_ranks(2, saving(copy_of(first, tmp_path / "work"), counting, steps=(3,)))
    total, outcomes = len(counting[victim].calls), set()
    for at in range(total):
        work = copy_of(first, tmp_path / "work")
        disks = [QUICK, QUICK]
        disks[victim] = DyingDisk(at)
        ended = run_ranks(2, saving(work, disks, steps=(3,)))
        assert isinstance(ended[victim], Killed)
        assert isinstance(ended[1 - victim], CollectiveError)
        found = run_ranks(2, reading(work))
        assert found[0] == found[1], f"the ranks disagree after call {at}"
        assert found[0][0] in (2, 3)
        outcomes.add(found[0][0])
    assert outcomes == {2, 3}


@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_fault_of_one_rank_is_the_error_of_all(tmp_path, victim):
    run_ranks(2, saving(tmp_path / "first"))
    counting = [FailingDisk(10**6, errno.EIO), FailingDisk(10**6, errno.EIO)]
    run_ranks(2, saving(copy_of(tmp_path / "first", tmp_path / "work"), counting, steps=(3,)))
    before_removal = counting[victim].calls.index("unlink")
    for at in range(2, before_removal):
        work = copy_of(tmp_path / "first", tmp_path / "work")
        disks = [QUICK, QUICK]
        disks[victim] = FailingDisk(at, errno.ENOSPC)
        ended = run_ranks(2, saving(work, disks, steps=(3,)))
        assert all(isinstance(error, SnapshotError) and "the disk is full" in str(error) for error in ended)
        assert run_ranks(2, reading(work)) == [(2, (1, 2))] * 2


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("what", ["snapshots/00000002.json", "objects"])
def test_damage_on_one_rank_takes_all_ranks_to_the_same_older_snapshot(tmp_path, victim, what):
    run_ranks(2, saving(tmp_path))
    place = tmp_path / f"rank-{victim:04d}-of-0002" / what
    flip(max(place.iterdir(), key=lambda path: path.stat().st_mtime_ns) if place.is_dir() else place, 2001)
    assert run_ranks(2, reading(tmp_path)) == [(1, (1,))] * 2


def test_a_rank_that_lost_its_part_is_named_and_one_older_is_still_the_same_everywhere(tmp_path):
    run_ranks(2, saving(tmp_path))
    (tmp_path / "rank-0001-of-0002" / "snapshots" / "00000002.json").unlink()

    def newest(processes):
        with opened(tmp_path, processes=processes) as folder:
            return folder.load(2).step

    ended = run_ranks(2, newest)
    assert all("rank-0001-of-0002/snapshots/00000002.json cannot be read" in str(error) for error in ended)
    assert run_ranks(2, reading(tmp_path)) == [(1, (1,))] * 2


def test_another_number_of_processes_is_refused(tmp_path):
    run_ranks(2, saving(tmp_path))
    with pytest.raises(SnapshotError, match="snapshots of a run with 2 processes, this one has 1"):
        opened(tmp_path)


def test_a_budget_is_that_of_all_ranks(tmp_path):
    one = sum(tensor.nbytes for tensor in rank_tensors(0, 1).values())
    own = rank_tensors(0, 1)["own"].nbytes
    ended = run_ranks(2, saving(tmp_path, steps=(1, 2, 3), keep=9, budget=2 * (one + own) + 5000))
    assert ended == [(2, 3)] * 2
    small = run_ranks(2, saving(tmp_path / "other", budget=one + 5000))
    assert all(isinstance(error, SnapshotError) and "larger than the budget" in str(error) for error in small)


def in_real_processes(rank, size, path, dies):
    processes = Processes.join(timeout=4)
    files = DyingDisk(12, really=True) if dies == rank else QUICK
    with SnapshotFolder(path, processes=processes, files=files) as folder:
        found = folder.latest()
        step = 0 if found is None else found.step
        assert found is None or torch.equal(found.tensors["own"], rank_tensors(rank, step)["own"])
        try:
            folder.save(step + 1, rank_tensors(rank, step + 1), {"rank": rank})
        except CollectiveError:
            return step, "another rank was gone"
        return step, "saved"


def test_two_real_processes_of_which_one_is_killed(tmp_path):
    path = tmp_path / "run"
    assert run_world(in_real_processes, 2, path, None) == [(0, "saved")] * 2
    assert run_world(in_real_processes, 2, path, 1, expect_dead=[1])[0] == (1, "another rank was gone")
    assert run_world(in_real_processes, 2, path, None) == [(1, "saved")] * 2


def test_a_flipped_bit_in_a_policy_file_is_refused_or_gives_another_digest(tmp_path):
    assert crash_cases.policy_flips(tmp_path / "policy", 100, random.Random(7)) == (100, 100)
