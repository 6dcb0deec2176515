"""A short section of evidence in a model's README, with its metadata: what `GuardCallback(model_card=True)` writes.

The section stands between two markers and the metadata under one key of the YAML header. Nothing else of the file
is touched: comments, order and line ends stay as they are, and writing twice changes nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from weightproof import report
from weightproof.certificate import Certificate
from weightproof.errors import InputError
from weightproof.folders.files import write_atomically

BEGIN = "<!-- weightproof: begin of evidence, written from a certificate -->"
END = "<!-- weightproof: end of evidence -->"
KEY = "weightproof"
README = "README.md"
_HEADER = re.compile(r"\A(\s*---[ \t\r]*\n)(.*?)(^---[ \t\r]*\n|^---[ \t\r]*\Z)", re.DOTALL | re.MULTILINE)
_OURS = re.compile(rf"^{KEY}:.*\n(?:[ \t]+.*\n|[ \t]*\n(?=[ \t]))*", re.MULTILINE)


def write_evidence(folder_or_readme: Path | str, certificate: Certificate) -> Path:
    """Write, or write anew, the evidence of a certificate into a model card.

    Args:
        folder_or_readme: The model's folder, or its README file, which need not exist.
        certificate: The evidence; the card names its digest.

    Returns:
        The README file.

    Raises:
        InputError: If the file is not UTF-8 text, its metadata are not YAML, or its markers were torn apart; the
            old file is kept.

    Example:
        >>> from weightproof import Certificate
        >>> certificate = Certificate.load("model/certificate.json")  # doctest: +SKIP
        >>> write_evidence("model", certificate)  # doctest: +SKIP
        PosixPath('model/README.md')
    """
    path = Path(folder_or_readme)
    path = path if path.suffix.lower() == ".md" else path / README
    old = _read(path)
    # A file with one kind of line ends keeps it; one that mixes them keeps every line as it is.
    ends = "\r\n" if "\r\n" in old and "\n" not in old.replace("\r\n", "") else "\n"
    text = old.replace(ends, "\n")
    new = _with_metadata(_with_section(text, report.section(certificate), path), metadata_of(certificate), path)
    content = new.replace("\n", ends)
    if content != old:
        write_atomically(path, content.encode())
    return path


def metadata_of(certificate: Certificate) -> dict[str, Any]:
    """What stands in the header under `weightproof`: decision, assurance, policy, digests, key ids."""
    told = report.summary(certificate)
    return {
        "decision": told["status"],
        "change": told["change"],
        "assurance": told["assurance"],
        "policy": str((certificate.predicate.get("policy") or {}).get("name", "")),
        "created_at": str(certificate.predicate.get("created_at", "")),
        "model_sha256": told["model_sha256"],
        "certificate_sha256": told["certificate_sha256"],
        "signed_by": list(certificate.signatures),
    }


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text, so no evidence was written into it ({error.reason})") from error
    except OSError as error:
        raise InputError(f"cannot read the model card {path}: {error.strerror or error}") from error


def _with_section(text: str, section: str, path: Path) -> str:
    """The text with the section in place of the old one, or at its end."""
    block = f"{BEGIN}\n{section}{END}\n"
    counts = text.count(BEGIN), text.count(END)
    if counts == (0, 0):
        gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        return f"{text}{gap}{block}"
    start, end = text.find(BEGIN), text.find(END)
    if counts != (1, 1) or end < start:
        raise InputError(
            f"the markers of weightproof in {path} were torn apart ({counts[0]} begin, {counts[1]} end it): remove "
            "them with what stands between them, and the evidence is written anew"
        )
    tail = text[end + len(END) :]
    return f"{text[:start]}{block}{tail.removeprefix(chr(10))}"


def _with_metadata(text: str, metadata: dict[str, Any], path: Path) -> str:
    """The text with our key of the YAML header replaced or added; every other line of it stays as it is."""
    ours = yaml.safe_dump({KEY: metadata}, sort_keys=False, allow_unicode=True, width=200)
    found = _HEADER.match(text)
    if found is None:
        return f"---\n{ours}---\n\n{text}"
    before = _parsed(text, path)
    header = _OURS.sub("", found[2])
    if header and not header.endswith("\n"):
        header += "\n"
    new = f"{found[1]}{header}{ours}{found[3]}{text[found.end() :]}"
    after = _parsed(new, path)
    after.pop(KEY, None)
    before.pop(KEY, None)
    if before != after:
        raise InputError(
            f"the metadata of {path} are written in a way that no key can be added to (braces, or anchors): write "
            "them as one key a line, then try again"
        )
    return new


def _parsed(text: str, path: Path) -> dict[str, Any]:
    """Metadata of a card, as the Hub reads them."""
    try:
        return ModelCard(text).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"the metadata of {path} are not valid YAML: {error}; correct them first") from error
