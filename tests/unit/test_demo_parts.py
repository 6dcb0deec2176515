"""The demo's parts, and the whole of it in its fast variant."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from once import once_a_run, shared_folder
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from wandb_records import read_offline_run

from weightproof import Action, Certificate, Decision, cli
from weightproof.errors import InputError
from weightproof.kinds import parse_kind
from weightproof.transactions.steps import Step
from weightproof.types import Assurance
from weightproof_callbacks.commands import demo_report
from weightproof_callbacks.commands.corpus import (
    END,
    beginning,
    cut_windows,
    read_corpus,
    source_files,
    spread,
    standard_library,
    token_bytes,
    train_tokenizer,
)
from weightproof_callbacks.commands.demo import MARKER, load_recipe, prepare_folder
from weightproof_callbacks.commands.demo_run import DemoResult
from weightproof_callbacks.commands.small_model import bits_per_byte, build_model, fastest_thread_count

TEXTS = [
    "def square(x):\n    return x * x\n" * 30,
    "naïve = 'ünïcode → bytes'\nfor i in range(3):\n    print(i)\n" * 30,
]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_the_split_is_by_file_and_the_same_every_time():
    part = load_recipe("demo")["corpus"]
    args = standard_library(), part["exclude"], part["max_bytes"], part["heldout_fraction"]
    corpus = read_corpus(*args)
    assert not set(corpus.train) & set(corpus.heldout)
    assert not {name.split("/")[0] for name in corpus.train} & {"test", "site-packages", "idlelib"}
    assert 0.02 < len(corpus.heldout) / (len(corpus.heldout) + len(corpus.train)) < 0.12
    again = read_corpus(*args)
    assert list(again.train) == list(corpus.train)
    assert list(again.heldout) == list(corpus.heldout)


def test_the_cap_on_bytes_is_kept(tmp_path):
    for number in range(20):
        (tmp_path / f"m{number}.py").write_text("x = 1\n" * 100)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "t.py").write_text("no")
    chosen = source_files(tmp_path, ["tests"], max_bytes=3_000)
    assert [path.stat().st_size for path in chosen] == [600] * 5
    assert chosen == sorted(chosen)


def test_no_sources_is_a_clear_error(tmp_path):
    with pytest.raises(InputError, match="no Python sources"):
        read_corpus(tmp_path, [], 1000, 0.1)
    (tmp_path / "one.py").write_text("pass")
    with pytest.raises(InputError, match="too few"):
        read_corpus(tmp_path, [], 1000, 0.1)


def test_tokens_account_for_every_byte_of_text():
    tokenizer = train_tokenizer(TEXTS, 300, 16)
    sizes = token_bytes(tokenizer)
    for text in [*TEXTS, "never seen: ∞ 漢字\t"]:
        ids = tokenizer(text)["input_ids"]
        assert sizes[ids].sum().item() == len(text.encode())
        assert tokenizer.decode(ids) == text


def test_windows_cover_the_text_without_its_rest():
    tokenizer = train_tokenizer(TEXTS, 300, 16)
    encoded = [tokenizer(text)["input_ids"] for text in TEXTS]
    end = tokenizer.convert_tokens_to_ids(END)
    flat = [*encoded[0], end, *encoded[1], end]
    windows = cut_windows(TEXTS, tokenizer, 16)
    assert windows.ids.flatten().tolist() == flat[: len(flat) // 16 * 16]
    expected = token_bytes(tokenizer)[windows.ids[0, 1:]].sum().item()
    assert windows.num_bytes[0].item() == expected
    picked = spread(windows, 3)
    assert picked.ids.shape == (3, 16)
    assert torch.equal(picked.ids[0], windows.ids[0])
    assert torch.equal(picked.ids[-1], windows.ids[-1])
    with pytest.raises(InputError, match="do not fill one window"):
        cut_windows(["x"], tokenizer, 16)


def test_the_beginning_of_every_text_is_kept_within_the_bytes_that_are_allowed():
    text = beginning(["ab\ncd\nef", "∞∞\n" * 9, "x"], 24)
    assert text == "ab\ncd\n∞∞\n"
    assert len(text.encode()) <= 24


def test_bits_per_byte_of_a_uniform_model_is_the_entropy_of_its_vocabulary():
    tokenizer = train_tokenizer(TEXTS, 300, 16)
    windows = cut_windows(TEXTS, tokenizer, 16)
    model = build_model(SIZES, vocab_size=len(tokenizer), window=16, seed=0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.train()
    tokens = windows.ids[:, 1:].numel()
    expected = tokens * math.log2(len(tokenizer)) / windows.num_bytes.sum().item()
    assert bits_per_byte(model, windows) == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_the_same_seed_builds_the_same_model():
    first, second, other = (build_model(SIZES, vocab_size=64, window=16, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_choosing_threads_leaves_torch_as_it_was():
    before = torch.get_num_threads()
    assert fastest_thread_count(0.01) in (1, before)
    assert torch.get_num_threads() == before


def test_the_fast_recipe_has_the_same_sections_and_smaller_numbers():
    full, fast = load_recipe("demo"), load_recipe("demo", fast=True)
    assert full.keys() == fast.keys()
    assert all(full[name].keys() == fast[name].keys() for name in full if isinstance(full[name], dict))
    assert fast["training"]["steps"] < full["training"]["steps"]
    assert full["heldout"]["max_bits_per_byte"] <= 2.2
    assert [edit["expect"] for edit in full["edits"]] == ["KEEP", "ROLLBACK"]
    with pytest.raises(InputError, match="no recipe 'absent'"):
        load_recipe("absent")


def test_an_earlier_demo_is_replaced_and_foreign_files_are_not(tmp_path):
    folder = tmp_path / "demo"
    prepare_folder(folder)
    (folder / "base").mkdir()
    (folder / "base" / "model.safetensors").write_text("old")
    prepare_folder(folder)
    assert [item.name for item in folder.iterdir()] == [MARKER]
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        prepare_folder(foreign)
    with pytest.raises(InputError, match="is a file"):
        prepare_folder(foreign / "thesis.txt")
    assert (foreign / "thesis.txt").read_text() == "precious"


def test_a_folder_that_cannot_be_used_is_one_sentence_and_code_3(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--output", str(tmp_path)])
    assert stop.value.code == 3
    assert "no earlier demo wrote it" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "alarms", "lines"), [(5, 0, 1), (5, 2, 2), (9, 6, 4)])
def test_training_windows_are_one_line_unless_there_are_alarms(count, alarms, lines):
    decided = [Action.ROLLBACK] * alarms + [Action.KEEP] * (count - alarms)
    result = DemoResult(Path("out"), windows=tuple(window(i, action) for i, action in enumerate(decided)))
    assert demo_report._decisions(result).row_count == lines


def window(number, action):
    """A judged training window without measurements."""
    step = Step("train", number, parse_kind("train"))
    step.decision = Decision(action, "s", "r", False, Assurance.NONE, (), (), number, 1, "")
    return step


@pytest.fixture(scope="module")
def fast_demo(tmp_path_factory):
    """One run of the whole demo, as a user starts it."""
    folder = shared_folder(tmp_path_factory) / "fast-demo"

    def run():
        folder.mkdir()
        return subprocess.run(
            [sys.executable, "-c", "from weightproof.cli import main; main()", "demo", "--fast", "--output", "out"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    done = once_a_run(tmp_path_factory, "fast-demo", run)
    return folder / "out", done


def test_the_fast_demo_keeps_int8_and_rolls_int2_back(fast_demo):
    output, done = fast_demo
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything as expected" in done.stdout
    assert ": equal" in done.stdout
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    judged = [(event["name"], event["action"], event["applied"]) for event in events if event["type"] == "event"]
    assert judged == [("rtn-int8-channel", "KEEP", "kept"), ("rtn-int2-channel", "ROLLBACK", "restored")]
    training = (output / "training" / "weightproof" / "events.jsonl").read_text().splitlines()
    windows = [event for event in map(json.loads, training) if event["type"] == "event"]
    assert len(windows) == 4
    assert {event["action"] for event in windows} == {"KEEP"}


def test_the_fast_demo_prints_paths_that_exist(fast_demo):
    output, done = fast_demo
    lines = [line for line in done.stdout.splitlines() if "weightproof certify" not in line]
    lines = [line for line in lines if "weightproof verify" not in line]
    printed = [line.split()[-1] for line in lines if line.rstrip().split("/")[0].endswith(" out")]
    assert len(printed) >= 8
    assert all((output.parent / path).exists() for path in printed), printed
    assert (output / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_the_fast_demo_leaves_loadable_models_and_a_certificate(fast_demo):
    output, _ = fast_demo
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "base")
    ids = torch.tensor([tokenizer("import os\n")["input_ids"]])
    logits = {}
    for name in ("base", "int8", "int2-rejected"):
        model = LlamaForCausalLM.from_pretrained(output / name).eval()
        with torch.no_grad():
            logits[name] = model(ids).logits
    moved = {name: (logits[name] - logits["base"]).abs().max().item() for name in logits}
    assert 0 < moved["int8"] < moved["int2-rejected"] / 10
    certificate = Certificate.load(output / "certificate.json")
    steps = certificate.statement["predicate"]["steps"]
    assert [step["action"] for step in steps] == ["KEEP", "ROLLBACK"]
    assert steps[0]["record"]["digest_after"] == certificate.statement["subject"][0]["digest"]["sha256"]


def test_the_fast_demo_prints_commands_that_certify_and_verify_its_folders(fast_demo, monkeypatch, capsys):
    output, done = fast_demo
    monkeypatch.chdir(output.parent)
    words = [line.split() for line in done.stdout.splitlines()]
    commands = [line[1:] for line in words if len(line) > 1 and line[0].endswith("weightproof")]
    codes = []
    for arguments in commands:
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        codes.append((arguments[0], stop.value.code or 0))
    assert codes == [("certify", 0), ("verify", 0), ("certify", 1), ("verify", 0)], capsys.readouterr()
    certificate = Certificate.load(output / "certified-int8" / "certificate.json")
    assert certificate.predicate["assurance"] == "loss"


def test_the_fast_demo_shares_one_offline_run(fast_demo):
    output, _ = fast_demo
    run = read_offline_run(output)
    losses = run.rows_with("train/loss")
    guarded = run.rows_with("guard/divergence/model/kl")
    assert losses
    assert {row["train/global_step"] for row in guarded} >= {241, 242}
    assert len(run.artifacts) >= 2
    assert run.alerts
