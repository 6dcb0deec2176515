"""Level 1, the folder: every file and every tensor is the one that the certificate is about."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from weightproof.certifying.form import Content
from weightproof.errors import InputError
from weightproof.folders.file_digests import WEIGHT_FILES, file_digests, left_out, tensor_digests
from weightproof.verification.result import Findings

_MOST = 20


def check_folder(
    content: Content, folder: Path, findings: Findings, *, skip: Collection[Path] = (), resharded: bool = False
) -> bool:
    """Compare a model folder with the subject; whether its tensors could be read.

    Args:
        content: The certificate.
        folder: The model folder.
        findings: Where differences go.
        skip: Files that are no part of the model, such as the certificate.
        resharded: Accept weights that are stored in other files, tensor for tensor the same.

    Raises:
        InputError: If the folder is missing or unsafe; also if it is torn and the certificate lists no files.
    """
    before = len(findings.differences)
    stated = content.certificate.files
    if stated:
        found = file_digests(folder, skip)
        if resharded:
            stated, found = ({k: v for k, v in one.items() if not k.endswith(WEIGHT_FILES)} for one in (stated, found))
        _compare_files(stated, found, findings)
        if own := left_out(folder, skip):
            findings.notes.append(f"written beside the model and not part of it: {', '.join(own)}")
    try:
        tensors = tensor_digests(folder)
    except InputError as error:
        if len(findings.differences) == before:
            raise
        findings.differs(str(folder), "weights", "readable safetensors files", str(error).splitlines()[0])
        return False
    _compare_tensors(content, tensors, findings)
    findings.checked.append(f"{len(tensors)} tensors" + (f" and {len(stated)} files" if stated else ""))
    if not stated:
        findings.notes.append(
            "the certificate is of a model in memory: tensors were compared, not config, tokenizer and other files"
        )
    return True


def check_base_files(stated: Mapping[str, str], folder: Path, findings: Findings, *, resharded: bool) -> None:
    """Compare the base folder with the files that the certificate names for it; reports beside it do not count."""
    found = file_digests(folder)
    if resharded:
        stated, found = ({k: v for k, v in one.items() if not k.endswith(WEIGHT_FILES)} for one in (stated, found))
    _compare_files(stated, found, findings, of=" of the base")


def _compare_files(stated: Mapping[str, str], found: Mapping[str, str], findings: Findings, of: str = "") -> None:
    for name in sorted(stated.keys() | found.keys()):
        if name not in found:
            findings.differs(f"file {name}{of}", "sha256", stated[name], None)
        elif name not in stated:
            findings.differs(f"file {name}{of}", "extra file", None, found[name])
        else:
            findings.require_equal(f"file {name}{of}", "sha256", stated[name], found[name])


def _compare_tensors(content: Content, found: Mapping[str, str], findings: Findings) -> None:
    stated = content.certificate.tensors
    names = _stored_names(content, stated, found)
    shown = 0
    for name, stored in names.items():
        if stored is None and name not in content.predicate.transient:
            findings.differs(f"tensor {name}", "digest", stated[name], None)
        elif stored is not None and stated[name] != found[stored] and shown < _MOST:
            shown += 1
            findings.differs(f"tensor {name}", "digest", stated[name], found[stored])
    if shown == _MOST:
        findings.notes.append(f"only the first {_MOST} tensors with another digest are listed")
    tied = {other for name in stated for other in content.predicate.ties.get(name, ())}
    for name in sorted(found.keys() - set(names.values())):
        original = next((one for one in stated if name in content.predicate.ties.get(one, ())), None)
        if name not in tied or original is None:
            findings.differs(f"tensor {name}", "extra tensor", None, found[name])
        else:  # a file may hold a tied tensor under each of its names
            findings.require_equal(f"tensor {name}", f"digest, tied to {original}", stated[original], found[name])


def _stored_names(content: Content, stated: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str | None]:
    """Name of each tensor of the subject -> its name in the files; a tied one may lie there under another."""
    ties = content.predicate.ties
    return {name: next((n for n in (name, *ties.get(name, ())) if n in found), None) for name in stated}
