"""Certificates for TLS tests, made with the openssl program: an authority, and what it or another one has signed."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.kit.requires import requires


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM files."""

    certificate: str
    key: str


class Authority:
    """A certificate authority that lives in *directory*."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self.pair = self._make(name, None)

    @property
    def certificate(self) -> str:
        return self.pair.certificate

    def sign(self, name: str, *, expired: bool = False) -> Pair:
        """A certificate for *name*, also valid for localhost."""
        return self._make(name, self.pair, expired)

    def _make(self, name: str, issuer: Pair | None, expired: bool = False) -> Pair:
        openssl = requires("openssl", "openssl")
        base = self._directory / f"{self._name}-{name}"
        pair = Pair(f"{base}.pem", f"{base}.key")
        request = [openssl, "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        request += ["-subj", f"/CN={name}", "-keyout", pair.key]
        if issuer is None:
            usage = "keyUsage=critical,keyCertSign,cRLSign"  # Python 3.13 insists
            _run([*request, "-x509", "-days", "30", "-out", pair.certificate, "-addext", usage])
            return pair
        request_file, extensions = f"{base}.csr", f"{base}.ext"
        Path(extensions).write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n")
        _run([*request, "-out", request_file])
        sign = [openssl, "x509", "-req", "-in", request_file, "-extfile", extensions, "-out", pair.certificate]
        sign += ["-CA", issuer.certificate, "-CAkey", issuer.key, "-CAcreateserial"]
        if expired:
            self._sign_expired(request_file, extensions, pair, issuer)
        else:
            _run([*sign, "-days", "30"])
        return pair

    def _sign_expired(self, request_file: str, extensions: str, pair: Pair, issuer: Pair) -> None:
        """`openssl x509` of Debian 12 cannot date back, `openssl ca` can."""
        home = self._directory / f"{Path(pair.certificate).stem}-ca"
        home.mkdir()
        (home / "index.txt").touch()
        (home / "serial").write_text("01\n")
        (home / "ca.cnf").write_text(
            f"[ca]\ndefault_ca=d\n[d]\ndatabase={home}/index.txt\nserial={home}/serial\nnew_certs_dir={home}\n"
            "default_md=sha256\npolicy=p\n[p]\ncommonName=supplied\n"
        )
        command = ["openssl", "ca", "-batch", "-notext", "-config", str(home / "ca.cnf"), "-in", request_file]
        command += ["-out", pair.certificate, "-extfile", extensions]
        command += ["-cert", issuer.certificate, "-keyfile", issuer.key]
        _run([*command, "-startdate", "20200101000000Z", "-enddate", "20200102000000Z"])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)
