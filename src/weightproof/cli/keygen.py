"""`weightproof keygen`: a key pair to sign certificates with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def keygen(
    path: Annotated[Path, typer.Argument(help="File of the private key; the public key gets the same name and .pub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print paths and key id as JSON.")] = False,
) -> None:
    """Make an Ed25519 key pair: keep the private key to yourself, give the public one to whoever verifies."""
    from weightproof.signing import generate_key, key_id, write_key_pair

    key = generate_key()
    private, public = write_key_pair(path, key)
    identity = key_id(key.public_key())
    if as_json:
        found = {"private": str(private), "public": str(public), "key_id": identity}
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    sys.stdout.write(
        f"private key  {private}  (only you can read it; never give it away)\n"
        f"public key   {public}  (for `weightproof verify --key`)\n"
        f"key id       {identity}\n"
    )
