"""What a user installs: light import, public names, one wheel with three packages and their data."""

import importlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import weightproof

ROOT = Path(__file__).resolve().parents[2]


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_hugging_face_nor_wandb():
    heavy = ("transformers", "wandb", "accelerate", "peft", "datasets", "evaluate", "torch")
    code = f"import sys, weightproof; print([m for m in {heavy!r} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_library_modules_load_neither_hugging_face_nor_wandb():
    heavy = ("transformers", "wandb", "accelerate", "peft", "datasets", "evaluate")
    code = (
        "import sys, weightproof, weightproof.session, weightproof.cli; weightproof.GuardSession; "
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_every_public_name_resolves_and_there_are_at_most_thirty():
    assert len(weightproof.__all__) == len(set(weightproof.__all__)) <= 30
    for name in weightproof.__all__:
        assert getattr(weightproof, name) is not None


def test_names_that_others_build_on_exist():
    names = {"GuardSession", "GuardCallback", "measure_spectrum", "fit_bulk", "iter_weight_matrices", "load_policy"}
    assert names | {"edits", "kinds"} <= set(weightproof.__all__)
    assert weightproof.edits.RTN(8).name
    assert {"Cast", "Quantize", "Prune", "LoraMerge"} <= set(vars(weightproof.kinds))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = weightproof.no_such_name


def test_entry_points_resolve():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for entries in project["entry-points"].values():
        for target in entries.values():
            module, _, name = target.partition(":")
            assert hasattr(importlib.import_module(module), name), target


def test_wheel_holds_three_packages_with_their_data(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for package in ("weightproof", "weightproof_callbacks", "weightproof_recipes"):
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    assert "weightproof/data/tiers/balanced.yaml" in names
    assert "weightproof_recipes/demo.yaml" in names
    assert "weightproof_recipes/accelerate/cpu_x2.yaml" in names
    assert not [name for name in names if name.startswith("tests/")]


def test_constraints_are_exact():
    lines = (ROOT / "constraints.txt").read_text().split()
    assert lines
    assert all("==" in line for line in lines)
