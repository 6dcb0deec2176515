"""The model card: evidence between two markers, metadata under one key, every other byte as it was."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard
from report_cases import HOSTILE, certificate, hostile, kept, with_loss
from tests.trainer.markov import trainer_for

from weightproof import Certificate, InputError
from weightproof.signing import generate_key
from weightproof_callbacks.model_card import BEGIN, END, write_evidence
from weightproof_callbacks.trainer import GuardCallback

HEADER = "---\n# chosen with care\nlicense: mit   # the usual\ntags: [a, 'b']\nfoo:\n  bar: 1\n---\n"
BODY = "\n# My model\n\nWords with trailing blanks   \n\n* a list\n\n| a | b |\n|---|---|\n"


def body_of(text: str) -> str:
    """The text without our section and without our key of the header."""
    without = re.sub(rf"\n?{re.escape(BEGIN)}.*?{re.escape(END)}\n", "", text, flags=re.DOTALL)
    return re.sub(r"^weightproof:\n(?: .*\n)+", "", without, flags=re.MULTILINE)


def test_new_card_reads_as_a_card(tmp_path):
    found = certificate(with_loss("rejected"))
    path = write_evidence(tmp_path / "model", found)
    assert path == tmp_path / "model" / "README.md"
    card = ModelCard.load(path)
    told = card.data.to_dict()["weightproof"]
    assert (told["decision"], told["assurance"], told["policy"]) == ("rollback", "loss", "balanced")
    assert (told["certificate_sha256"], told["model_sha256"]) == (found.digest, found.model_digest)
    assert told["signed_by"] == []
    assert "**ROLLBACK.**" in card.text
    assert found.digest in card.text
    assert "Not signed" in card.text


@pytest.mark.parametrize("text", [HEADER + BODY, BODY, "", "one line without an end", HEADER, "---\nlicense: mit\n---"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_the_users_text_stays_as_it_is_and_writing_twice_changes_nothing(tmp_path, text, ends):
    path = tmp_path / "README.md"
    path.write_bytes(text.replace("\n", ends).encode())
    write_evidence(path, certificate(kept()))
    first = path.read_bytes()
    assert (b"\r\n" in first) == (ends == "\r\n" and "\n" in text)
    left = body_of(first.decode().replace("\r\n", "\n"))
    if not text.startswith("---"):
        left = left.removeprefix("---\n---\n").removeprefix("\n")
    assert left.rstrip("\n") == text.rstrip("\n")
    write_evidence(path, certificate(kept()))
    assert path.read_bytes() == first
    assert first.count(BEGIN.encode()) == 1


def test_mixed_line_ends_stay_mixed(tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(b"---\r\nlicense: mit\r\n---\r\none\ntwo\r\n")
    write_evidence(path, certificate(kept()))
    text = path.read_bytes()
    assert text.startswith(b"---\r\nlicense: mit\r\nweightproof:\n")
    assert b"\n---\r\none\ntwo\r\n" in text
    assert ModelCard.load(path).data.to_dict()["license"] == "mit"


def test_newer_evidence_takes_the_place_of_the_older(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(HEADER + BODY)
    write_evidence(path, certificate(kept()))
    with path.open("a") as file:
        file.write("\nwritten below\n")
    signed = Certificate.load(certificate().save(tmp_path / "c.json", key=generate_key()))
    write_evidence(path, signed)
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == text.count("weightproof:\n  decision: rollback") == 1
    assert "**KEEP.**" not in text
    assert body_of(text) == HEADER + BODY + "\nwritten below\n"
    data = ModelCard.load(path).data.to_dict()
    assert data["weightproof"]["signed_by"] == list(signed.signatures)
    assert (data["license"], data["tags"], data["foo"]) == ("mit", ["a", "b"], {"bar": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"text\n{BEGIN}\nno end\n".encode(), "torn apart"),
        (f"{END}\n{BEGIN}\n".encode(), "torn apart"),
        (b"\xff\xfe binary", "not UTF-8"),
        (b"---\na: [1\n---\ntext\n", "not valid YAML"),
        (b"---\n{license: mit}\n---\ntext\n", "one key a line|not valid YAML"),
    ],
)
def test_card_that_cannot_be_changed_safely_is_left_alone(tmp_path, content, message):
    path = tmp_path / "README.md"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        write_evidence(path, certificate(kept()))
    assert path.read_bytes() == content
    assert [item.name for item in tmp_path.iterdir()] == ["README.md"]


def test_no_text_of_a_certificate_leaves_its_section(tmp_path):
    found = hostile()
    found["predicate"]["not_tested"] += [f"{END}\n# mine {BEGIN}", "a\n---\nb"]
    path = write_evidence(tmp_path, certificate(found))
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.endswith(f"{END}\n")
    assert ModelCard.load(path).data.to_dict()["weightproof"]["assurance"] == HOSTILE
    shown = text.partition(BEGIN)[2]
    assert "<script" not in shown.replace("\\<", "")
    assert not [line for line in shown.splitlines() if line.startswith(("# ", "---"))]
    assert write_evidence(tmp_path, certificate(found)).read_text() == text


def test_training_writes_the_card_when_asked(tmp_path):
    (tmp_path / "README.md").write_text(HEADER + BODY)
    guard = GuardCallback(every=2, model_card=True, trackers=[])
    trainer_for(tmp_path, [guard], steps=2).train()
    found = Certificate.load(tmp_path / "weightproof" / "certificate.json")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["weightproof"]["certificate_sha256"] == found.digest
    assert body_of((tmp_path / "README.md").read_text()) == HEADER + BODY
    assert "train" in (tmp_path / "weightproof" / "report.html").read_text()


def test_card_that_cannot_be_written_ends_no_training(tmp_path, caplog):
    (tmp_path / "README.md").write_bytes(b"\xff")
    guard = GuardCallback(every=2, model_card=True, trackers=[])
    trainer_for(tmp_path, [guard], steps=2).train()
    assert "the model card has no evidence" in caplog.text
    assert (tmp_path / "README.md").read_bytes() == b"\xff"
    assert len(guard.history) == 1


def test_training_writes_no_card_unasked(tmp_path):
    trainer_for(tmp_path, [GuardCallback(every=2, trackers=[])], steps=2).train()
    assert not (tmp_path / "README.md").exists()
