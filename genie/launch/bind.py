"""How servers that others may reach prove who they are: by certificates, or not at all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bind:
    """PEM files at the same paths on every host: ``tls_cert`` and ``tls_key`` for the servers, ``tls_ca``
    (default: ``tls_cert``) for the client. ``insecure``: beyond loopback without them."""

    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    insecure: bool = False

    @property
    def ca(self) -> str | None:
        """What a client must trust; None where the servers do not speak TLS."""
        return None if self.tls_cert is None else self.tls_ca or self.tls_cert

    @property
    def serve_args(self) -> list[str]:
        """For ``genie serve``."""
        tls = [] if self.tls_cert is None else ["--tls-cert", self.tls_cert, "--tls-key", self.tls_key or ""]
        return [*tls, *(["--insecure"] if self.insecure else [])]
