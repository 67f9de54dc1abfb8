"""Ed25519 signatures of a log's footer, by the library ``cryptography`` (extra ``audit``).

Make a key pair with ``openssl genpkey -algorithm ed25519 -out key.pem`` and
``openssl pkey -in key.pem -pubout -out key.pub``; keys of ``ssh-keygen -t ed25519`` work too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medr1_verl.errors import UserError


def message(root: str, answers: int) -> bytes:
    """What is signed: the root of the chain and the number of answers, under a name of this use's own."""
    return f"medr1-audit/1 root={root} answers={answers}".encode()


def _library() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise UserError("signatures need the library cryptography: pip install 'medr1-verl[audit]'") from error
    return serialization


def load_private_key(path: Path) -> Any:
    """An Ed25519 private key from PEM or OpenSSH; raises :class:`UserError` for any other file."""
    serialization = _library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        data = path.read_bytes()
        load = serialization.load_ssh_private_key if b"OPENSSH" in data else serialization.load_pem_private_key
        key = load(data, password=None)
    except OSError as error:
        raise UserError(f"key {path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(
            f"key {path}: is no unencrypted private key in PEM or OpenSSH form; "
            "make one with: openssl genpkey -algorithm ed25519 -out key.pem"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"key {path}: is not an Ed25519 key; make one with: openssl genpkey -algorithm ed25519")
    return key


def load_public_key(path: Path) -> str:
    """The 32 bytes of an Ed25519 public key as hex, from PEM or OpenSSH; raises :class:`UserError`."""
    serialization = _library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        data = path.read_bytes()
        ssh = data.startswith(b"ssh-")
        key = (serialization.load_ssh_public_key if ssh else serialization.load_pem_public_key)(data)
    except OSError as error:
        raise UserError(f"key {path}: cannot be read: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"key {path}: is no public key in PEM or OpenSSH form") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"key {path}: is not an Ed25519 public key")
    return key.public_bytes_raw().hex()


def signature_fields(key: Any, root: str, answers: int) -> dict[str, str]:
    """The footer's ``public_key`` and ``signature`` (hex)."""
    return {
        "public_key": key.public_key().public_bytes_raw().hex(),
        "signature": key.sign(message(root, answers)).hex(),
    }


def signature_problem(footer: Mapping[str, Any], public_key: str | None) -> str:
    """Why the footer is not signed by ``public_key`` (hex; None: by the key that it names itself); "" if it is."""
    if "signature" not in footer:
        return "is not signed"
    if public_key is not None and footer.get("public_key") != public_key:
        return f"is signed by another key ({footer.get('public_key')}) than the one given ({public_key})"
    _library()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(footer["public_key"]))
        key.verify(bytes.fromhex(footer["signature"]), message(footer["root"], footer["answers"]))
    except (InvalidSignature, ValueError, KeyError, TypeError):
        return "has a signature that its key did not make"
    return ""
