"""Proof of the shared token, in both directions, and TLS contexts. The token never crosses the wire."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import ssl
from pathlib import Path

from genie.errors import AuthError, ConfigError

TOKEN_VARIABLE = "GENIE_TOKEN"
NONCE_BYTES = 32


def new_token() -> str:
    return secrets.token_hex(32)


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def client_mac(token: str, challenge: bytes) -> bytes:
    return _mac(token, b"client", challenge)


def server_mac(token: str, client_nonce: bytes) -> bytes:
    return _mac(token, b"server", client_nonce)


def same_mac(a: bytes, b: bytes) -> bool:
    return hmac.compare_digest(a, b)


def _mac(token: str, role: bytes, nonce: bytes) -> bytes:
    return hmac.new(token.encode(), role + nonce, hashlib.sha256).digest()


def load_token(token_file: str | None) -> str | None:
    """The token of ``--token-file`` or of the environment; None when neither is given.

    Raises ConfigError for a file that is missing or empty, or that others may read.
    """
    if token_file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    path = Path(token_file)
    try:
        token = path.read_text().strip()
        mode = path.stat().st_mode
    except OSError as exc:
        raise ConfigError(f"cannot read the token file {token_file}: {exc.strerror}") from exc
    if not token:
        raise ConfigError(f"the token file {token_file} is empty: put a long random text into it")
    if mode & 0o077:
        raise ConfigError(f"the token file {token_file} can be read by others: chmod 600 {token_file}")
    return token


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, *, token_given: bool, tls: bool, insecure: bool) -> None:
    """Raises AuthError when the bind would let strangers in, or let them read along."""
    if is_loopback(host) or insecure or (token_given and tls):
        return
    missing = [
        text
        for there, text in (
            (token_given, f"a token (--token-file or {TOKEN_VARIABLE})"),
            (tls, "--tls-cert/--tls-key"),
        )
        if not there
    ]
    raise AuthError(
        f"refusing to listen on {host}, which is not loopback, without {' and '.join(missing)}: "
        "give them, or spell out --insecure on a network that you trust"
    )


def server_tls(cert: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"cannot load the TLS certificate {cert} with key {key}: {exc}") from exc
    return context


def client_tls(ca: str) -> ssl.SSLContext:
    """Trusts certificates signed by ``ca`` (or ``ca`` itself) for the host name that is dialled."""
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"cannot load the TLS certificate authority {ca}: {exc}") from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
