"""`weightproof diagnose`: table, JSON, picture, exit codes, and what it refuses."""

import io
import json

import pytest
import torch
from architectures import build
from PIL import Image

from weightproof import health
from weightproof.cli import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    healthy, broken = build("llama"), build("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight.mul_(1e5)
    healthy.save_pretrained(root / "healthy")
    broken.save_pretrained(root / "broken")
    rows = [{"input_ids": torch.randint(3, 64, (12,)).tolist()} for _ in range(40)]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(["diagnose", *map(str, arguments), "--rows", "4", "--length", "12"])
    out = capsys.readouterr()
    return left.value.code or 0, out.out, out.err


def test_a_healthy_model_and_a_broken_one(folders, capsys):
    code, out, _ = run(capsys, folders / "healthy", "--warmup")
    assert code == 0
    assert "residual_growth     pass" in out
    assert "labels sampled" in out
    code, out, _ = run(capsys, folders / "broken", "--warmup")
    assert code == 1
    assert "needs walk-back: residual_growth" in out


def test_json_and_picture(folders, capsys, tmp_path):
    plot = tmp_path / "health.png"
    code, out, _ = run(
        capsys, folders / "healthy", "--warmup", "--data", folders / "data.jsonl", "--depth", "skip", "--json",
        "--plot", plot,
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found["overall"] == "pass"
    assert found["provenance"]["labels"] == "given"
    assert found["provenance"]["rows"] == 4
    assert len(found["provenance"]["model_digest"]) == 64
    assert found["diagnostics"]["depth_utility"]["value"] is not None
    with Image.open(plot) as picture:
        assert picture.size == (1430, 936)


def test_what_is_refused(folders, capsys, tmp_path):
    for arguments, words in (
        ((tmp_path / "nowhere",), "there is no folder"),
        ((folders / "healthy", "--depth", "skip"), "give --data"),
        ((folders / "healthy", "--blocks", "model.nowhere"), "no module 'model.nowhere'"),
        ((folders / "healthy", "--plot", tmp_path / "x.jpg"), "ends in .png"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 3
        assert words in err
        assert err.count("\n") == 1


def test_pictures_say_why_a_panel_is_empty():
    for report in (
        health.from_numbers(),
        health.from_numbers(residual_norms=[1, 2, float("nan")], bp_grad_norms=[1, 1, 1]),
        health.from_numbers(residual_norms=[1, 2e5], headline_acc=0.3, frozen_baseline_acc=0.35, num_items=500),
    ):
        with Image.open(io.BytesIO(health.health_png(report))) as picture:
            assert picture.format == "PNG"
