"""A client of the Kubernetes API of its own, so that what judges Fimbria shares no code with it: plain HTTP/1.1, the
client certificate of a kubeconfig, JSON in and out."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import yaml


class ApiRefused(Exception):
    """An answer other than 2xx."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:500]}")
        self.status = status


@dataclass(frozen=True)
class Api:
    """One server, as one user. Safe to use from several threads."""

    host: str
    port: int
    tls: ssl.SSLContext

    @classmethod
    def of(cls, kubeconfig: Path) -> Api:
        """The only user and cluster of a kubeconfig with embedded certificates or paths to them."""
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        url = urlsplit(cluster["server"])
        tls = ssl.create_default_context(cadata=_pem(cluster, "certificate-authority").decode())
        with tempfile.NamedTemporaryFile(prefix="fim") as pair:  # ssl reads certificates from files only
            pair.write(_pem(user, "client-certificate") + b"\n" + _pem(user, "client-key"))
            pair.flush()
            tls.load_cert_chain(pair.name)
        return cls(url.hostname or "", url.port or 443, tls)

    def connect(self, timeout: float = 30.0) -> http.client.HTTPSConnection:
        """A connection of one's own."""
        return http.client.HTTPSConnection(self.host, self.port, context=self.tls, timeout=timeout)

    def request(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Any:
        """One request. Raises ApiRefused, OSError."""
        data = None if body is None else json.dumps(body).encode()
        with closing(self.connect()) as connection:
            connection.request(method, path, data, {"Content-Type": content_type})
            response = connection.getresponse()
            text = response.read().decode()
            if response.status // 100 != 2:
                raise ApiRefused(response.status, text)
            return json.loads(text)

    def watch(self, path: str, version: str, seconds: int = 3600, **selectors: str) -> Iterator[dict[str, Any]]:
        """Events as they come, until the server ends it. Raises ApiRefused, OSError."""
        query = urlencode({"watch": "1", "resourceVersion": version, "timeoutSeconds": seconds, **selectors})
        with closing(self.connect(timeout=seconds)) as connection:
            connection.request("GET", f"{path}?{query}")
            response = connection.getresponse()
            if response.status != 200:
                raise ApiRefused(response.status, response.read().decode())
            while line := response.readline():
                yield json.loads(line)


def _pem(section: dict[str, Any], name: str) -> bytes:
    if data := section.get(f"{name}-data"):
        return base64.b64decode(data)
    return Path(section[name]).read_bytes()
