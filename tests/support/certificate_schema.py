"""Writes the shipped JSON schema anew from the types: python tests/support/certificate_schema.py."""

import json
from pathlib import Path

import weightproof
from weightproof.certifying import form as certificate_form

PATH = Path(weightproof.__file__).parent / "data" / "certificate.schema.json"


def text() -> str:
    return json.dumps(certificate_form.schema(), indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
