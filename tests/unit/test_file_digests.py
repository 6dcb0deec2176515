"""Digests of model folders: every file, every tensor whatever the sharding, nothing outside, nothing executed."""

import hashlib
import json
import os
import pickle

import pytest
import torch
from architectures import build
from safetensors.torch import load_file, save_file

from weightproof import InputError
from weightproof.folders.file_digests import file_digests, files_of, left_out, tensor_digests
from weightproof.snapshots.tensor_store import tensor_digest


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    build("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def shard(folder, parts):
    """Store the weights of a folder in several files, in another order."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    places = {}
    for index in range(parts):
        file = f"model-{index + 1:05}-of-{parts:05}.safetensors"
        mine = names[index::parts]
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_every_file_counts_hidden_ones_and_those_below_too(folder):
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "x").write_bytes(b"payload")
    (folder / ".hidden").write_bytes(b"")
    found = file_digests(folder)
    assert {".git/objects/x", ".hidden", "config.json", "model.safetensors"} <= found.keys()
    for name, digest in found.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_only_the_certificates_own_files_at_the_top_are_left_out(folder):
    (folder / "deep").mkdir()
    for place in (folder, folder / "deep"):
        (place / "certificate.json").write_text("{}")
    (folder / "mine.json").write_text("{}")
    skip = [folder / "mine.json"]
    assert {"deep/certificate.json"} == {name for name in file_digests(folder, skip) if "cert" in name}
    assert "mine.json" not in file_digests(folder, skip)
    assert "mine.json" in file_digests(folder)
    assert left_out(folder, skip) == ["certificate.json", "mine.json"]


def test_tensors_have_the_same_digests_however_they_are_sharded(folder):
    stored = {name: tensor_digest(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    whole = tensor_digests(folder)
    assert sorted(whole.values()) == sorted(stored.values())
    assert whole == stored
    shard(folder, 3)
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert tensor_digests(folder) == whole


def test_one_bit_gives_one_tensor_another_digest(folder):
    before = tensor_digests(folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    after = tensor_digests(folder)
    assert sum(before[name] != after[name] for name in before) == 1


def test_what_is_no_file_of_the_folder_is_refused(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("not yours")
    (folder / "link").symlink_to(secret)
    with pytest.raises(InputError, match=r"link.*leads out"):
        file_digests(folder)
    (folder / "link").unlink()
    (folder / "inner").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"inner.*leads out"):
        file_digests(folder)
    (folder / "inner").unlink()
    (folder / "sub").mkdir()
    (folder / "again").symlink_to(folder / "sub")
    with pytest.raises(InputError, match=r"again is no regular file"):
        file_digests(folder)
    (folder / "again").unlink()
    (folder / "dangling").symlink_to(folder / "nothing")
    with pytest.raises(InputError, match="link to nothing"):
        file_digests(folder)
    (folder / "dangling").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        file_digests(folder)


def test_a_link_to_a_file_of_the_folder_is_read(folder):
    (folder / "copy.json").symlink_to(folder / "config.json")
    found = file_digests(folder)
    assert found["copy.json"] == found["config.json"]
    assert [path.name for path in files_of(folder)] == sorted(path.name for path in folder.iterdir())


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickles_are_refused_and_never_opened(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="pickle"):
        tensor_digests(folder)
    assert file_digests(folder)["pytorch_model.bin"]
    assert not (folder.parent / "exploded").exists()


def test_a_header_beyond_any_model_is_refused_before_it_is_read(folder):
    (folder / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="header of 1152921504606846976 bytes"):
        tensor_digests(folder)


@pytest.mark.parametrize("name", ["none", "file"])
def test_what_is_no_folder_is_named(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=name):
        file_digests(tmp_path / name)
