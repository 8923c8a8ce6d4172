"""What clients need: a bearer token, a self-signed certificate, and the kubeconfig that carries both."""

from __future__ import annotations

import base64
import ipaddress
import os
import secrets
import shutil
import ssl
import subprocess
from pathlib import Path

import yaml


class CredentialError(RuntimeError):
    """The certificate can't be made; the message says why."""


def private_write(path: Path, text: str) -> None:
    """Writes a file that only its owner can read, in one step."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    scratch.rename(path)


def token(path: Path) -> str:
    """The token kept in a file, made at first use, so that kubeconfigs outlive a restart."""
    if not path.exists():
        private_write(path, secrets.token_urlsafe(32))
    return path.read_text().strip()


def certificate(folder: Path, hosts: list[str]) -> tuple[Path, Path]:
    """A self-signed certificate and key for these hosts, made anew when the hosts change. Raises CredentialError."""
    crt, key, names = folder / "server.crt", folder / "server.key", folder / "server.hosts"
    wanted = "\n".join(sorted({*hosts, "127.0.0.1", "::1", "localhost", "kubernetes.default.svc"}))
    if crt.exists() and key.exists() and names.exists() and names.read_text() == wanted:
        return crt, key
    openssl = shutil.which("openssl")
    if not openssl:
        raise CredentialError("the openssl program is needed to make the API server's certificate; install openssl")
    alternatives = ",".join(f"{'IP' if _is_ip(host) else 'DNS'}:{host}" for host in wanted.split())
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
               "3650", "-subj", "/CN=fimbria-lab-apiserver", "-addext", f"subjectAltName={alternatives}", "-keyout",
               str(key), "-out", str(crt)]  # fmt: skip
    previous = os.umask(0o077)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    finally:
        os.umask(previous)
    if done.returncode != 0:
        raise CredentialError(f"openssl can't make the API server's certificate: {done.stderr.strip()[-500:]}")
    names.write_text(wanted)
    return crt, key


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def server_context(crt: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(crt, key)
    return context


def kubeconfig(server: str, authority: bytes, bearer: str) -> str:
    """A kubeconfig with one context, the authority inline (PEM, base64) and a bearer token."""
    cluster = {"server": server, "certificate-authority-data": base64.b64encode(authority).decode()}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "fimbria", "cluster": cluster}],
        "users": [{"name": "admin", "user": {"token": bearer}}],
        "contexts": [{"name": "fimbria", "context": {"cluster": "fimbria", "user": "admin"}}],
        "current-context": "fimbria",
    }
    return yaml.safe_dump(config, sort_keys=False)
