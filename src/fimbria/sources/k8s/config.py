"""How to reach an API server: kubeconfig files and the in-cluster service account. Files that are rotated (tokens,
authorities, client certificates) are read again while we run.

Format: https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/ . Credential plugins (`exec`, `auth-provider`),
impersonation, passwords and proxies aren't supported and say so, naming the entry: they need a program or a right that
a network agent shouldn't depend on.
"""

import base64
import binascii
import os
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_MAX_BYTES = 4 << 20
_UNSUPPORTED_USER = {
    "exec": "a credential plugin (exec)",
    "auth-provider": "an auth-provider",
    "username": "a user name and password",
    "password": "a user name and password",
    "as": "impersonation (as)",
    "as-uid": "impersonation (as-uid)",
    "as-groups": "impersonation (as-groups)",
}


class ConfigError(ValueError):
    """One sentence that names the file and the field."""


class Token:
    """A bearer token: fixed text, or a file that is read again after `max_age` seconds since kubelet rotates it.

    A file that can't be read keeps the token of before: it may well still be valid, and the API says if not.
    """

    def __init__(
        self,
        text: str = "",
        path: Path | None = None,
        *,
        max_age: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._text = text
        self._path = path
        self._max_age = max_age
        self._clock = clock
        self._read_at: float | None = None

    def __repr__(self) -> str:
        return f"<Token from {self._path or 'configuration'}>"

    def get(self) -> str:
        """The token. Raises ConfigError when its file never could be read."""
        now = self._clock()
        if self._path is not None and (self._read_at is None or now - self._read_at >= self._max_age):
            try:
                self._text = _read(self._path).decode("ascii").strip()
            except (ConfigError, UnicodeDecodeError) as error:
                if not self._text:
                    raise ConfigError(f"the token file {self._path} is unusable: {error}") from None
            self._read_at = now
        return self._text

    def expire(self) -> None:
        """The server refused the token: read the file again at the next use."""
        self._read_at = None


class Trust:
    """A TLS context made from files, which are read again after `max_age` seconds since authorities and client
    certificates are rotated; a new context if they changed, so that connections are made anew.

    What can't be used keeps the context of before: a file may be half written, and the server says if it won't do.
    """

    def __init__(
        self,
        make: Callable[[], ssl.SSLContext],
        files: tuple[Path, ...],
        *,
        max_age: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make
        self._files = files
        self._max_age = max_age
        self._clock = clock
        self._seen = self._contents()
        self._context = make()
        self._read_at = clock()

    def get(self) -> ssl.SSLContext:
        """The context to connect with."""
        now = self._clock()
        if now - self._read_at >= self._max_age:
            self._read_at = now
            contents = self._contents()
            if contents != self._seen:
                with suppress(ConfigError):
                    self._context = self._make()
                    self._seen = contents
        return self._context

    def expire(self) -> None:
        """The two sides don't trust each other: look at the files again at the next use."""
        self._read_at = float("-inf")

    def _contents(self) -> tuple[bytes, ...]:
        found = []
        for path in self._files:
            with suppress(ConfigError):
                found.append(_read(path))
        return tuple(found)


@dataclass(frozen=True)
class ClusterConfig:
    """Where the API server is and how to prove who we are. Build with `load`; `tls` is None for plain http. `trust`
    renews `tls` when it comes from files."""

    server: str
    tls: ssl.SSLContext | None = None
    tls_server_name: str = ""
    token: Token | None = None
    namespace: str = "default"
    origin: str = field(default="", compare=False)
    trust: Trust | None = field(default=None, compare=False)


def load(
    path: str | Path | None = None,
    *,
    context: str = "",
    server: str = "",
    environ: Mapping[str, str] = os.environ,
    service_account: Path = SERVICE_ACCOUNT,
) -> ClusterConfig:
    """Configuration from `path`, else $KUBECONFIG, else the pod's service account, else ~/.kube/config.

    `context` selects one of the file's contexts, `server` replaces the server's URL: an agent that has to reach the
    API before Services work needs an address of the server itself. Raises ConfigError.
    """
    chosen = str(path) if path else environ.get("KUBECONFIG", "")
    if os.pathsep in chosen and not path:
        raise ConfigError(f"$KUBECONFIG names several files ({chosen}); merging isn't supported, choose one")
    home = Path(environ.get("HOME", "/root")) / ".kube" / "config"
    if chosen:
        return from_kubeconfig(Path(chosen), context=context, server=server)
    if environ.get("KUBERNETES_SERVICE_HOST"):
        return in_cluster(server=server, environ=environ, service_account=service_account)
    if home.exists():
        return from_kubeconfig(home, context=context, server=server)
    raise ConfigError(
        f"no way to reach a Kubernetes API: no kubeconfig was given, $KUBECONFIG isn't set, {home} doesn't exist, "
        "and this isn't a pod ($KUBERNETES_SERVICE_HOST isn't set)"
    )


def in_cluster(
    *, server: str = "", environ: Mapping[str, str] = os.environ, service_account: Path = SERVICE_ACCOUNT
) -> ClusterConfig:
    """The pod's own service account. Raises ConfigError naming the missing variable or file."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host and not server:
        raise ConfigError("not in a pod: $KUBERNETES_SERVICE_HOST isn't set")
    token = Token(path=service_account / "token")
    token.get()
    authority = service_account / "ca.crt"
    trust = Trust(lambda: _trust(_read(authority), str(authority)), (authority,))
    try:
        namespace = _read(service_account / "namespace").decode().strip()
    except ConfigError:
        namespace = "default"
    url = server or f"https://{f'[{host}]' if ':' in host else host}:{port}"
    _check_server(url, "the in-cluster configuration")
    https = url.startswith("https:")
    return ClusterConfig(
        url.rstrip("/"), trust.get() if https else None, "", token, namespace, "the pod's service account",
        trust if https else None,
    )  # fmt: skip


def from_kubeconfig(path: Path, *, context: str = "", server: str = "") -> ClusterConfig:
    """One context of a kubeconfig file. Relative file names are relative to it. Raises ConfigError."""
    document = _parse(path)
    wanted = context or document.get("current-context") or ""
    if not wanted:
        raise ConfigError(f"{path}: no current-context is set and no context was chosen")
    chosen = _entry(path, document, "contexts", "context", str(wanted))
    cluster = _Section(path, f"cluster {chosen.text('cluster')!r}", chosen.follow(document, "clusters", "cluster"))
    user = _Section(path, "no user", {})
    if chosen.text("user"):
        user = _Section(path, f"user {chosen.text('user')!r}", chosen.follow(document, "users", "user"))
    _refuse(cluster, user)
    url = server or cluster.text("server")
    _check_server(url, f"{path}: {cluster.name}: server")
    trust = Trust(lambda: _tls(cluster, user), _files(cluster, user)) if url.startswith("https:") else None
    return ClusterConfig(
        server=url.rstrip("/"),
        tls=trust.get() if trust else None,
        trust=trust,
        tls_server_name=cluster.text("tls-server-name"),
        token=_token(user),
        namespace=chosen.text("namespace") or "default",
        origin=f"{path}, context {wanted}",
    )


class _Section:
    """A mapping of the file together with how to name it in a message."""

    def __init__(self, path: Path, name: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {name} must be a mapping")
        self.path, self.name, self.values = path, name, values

    def error(self, key: str, text: str) -> ConfigError:
        return ConfigError(f"{self.path}: {self.name}: {key} {text}")

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(key, f"must be text, not {type(value).__name__}")
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def follow(self, document: dict[str, Any], plural: str, singular: str) -> Any:
        """What this context's reference `singular` points to."""
        name = self.text(singular)
        if not name:
            raise self.error(singular, "is missing")
        return _entry(self.path, document, plural, singular, name).values

    def file(self, key: str) -> Path | None:
        value = self.text(key)
        return self.path.parent / value if value else None

    def data(self, key: str) -> tuple[bytes, str] | None:
        """Bytes of `KEY-data` (base64) or of the file that KEY names, with the origin for messages."""
        inline = self.text(f"{key}-data")
        if inline:
            try:
                return base64.b64decode(inline, validate=True), f"{self.path}: {self.name}: {key}-data"
            except (binascii.Error, ValueError):
                raise self.error(f"{key}-data", "isn't valid base64") from None
        path = self.file(key)
        if path is None:
            return None
        try:
            return _read(path), f"{self.path}: {self.name}: {key}"
        except ConfigError as error:
            raise self.error(key, f"is unusable: {error}") from None


def _parse(path: Path) -> dict[str, Any]:
    import yaml  # late: in a pod there is no kubeconfig

    try:
        document = yaml.safe_load(_read(path))
    except (yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise ConfigError(f"{path}: not valid YAML{line}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: not a kubeconfig: a mapping with clusters, users and contexts was expected")
    return document


def _entry(path: Path, document: dict[str, Any], plural: str, singular: str, name: str) -> _Section:
    entries = document.get(plural) or []
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: {plural} must be a list")
    for entry in entries:
        if isinstance(entry, dict) and entry.get("name") == name:
            return _Section(path, f"{singular} {name!r}", entry.get(singular) or {})
    known = ", ".join(str(e.get("name")) for e in entries if isinstance(e, dict)) or "none"
    raise ConfigError(f"{path}: there is no {singular} named {name!r} (there are: {known})")


def _refuse(cluster: _Section, user: _Section) -> None:
    for key, what in _UNSUPPORTED_USER.items():
        if user.values.get(key):
            raise ConfigError(
                f"{user.path}: {user.name} wants {what}, which isn't supported; use a token, tokenFile or client "
                "certificate"
            )
    if cluster.values.get("proxy-url"):
        raise cluster.error("proxy-url", "isn't supported")


def _token(user: _Section) -> Token | None:
    path = user.file("tokenFile")
    if path is not None:
        token = Token(path=path)
        try:
            token.get()
        except ConfigError as error:
            raise user.error("tokenFile", f"is unusable: {error}") from None
        return token
    text = user.text("token")
    if not text:
        return None
    if not text.isascii() or not text.isprintable():
        raise user.error("token", "contains characters that can't be sent in a header")
    return Token(text)


def _check_server(url: str, where: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{where}: {url!r} is no http or https URL of an API server")


def _files(cluster: _Section, user: _Section) -> tuple[Path, ...]:
    wanted = ((cluster, "certificate-authority"), (user, "client-certificate"), (user, "client-key"))
    return tuple(path for section, key in wanted if (path := section.file(key)) is not None)


def _tls(cluster: _Section, user: _Section) -> ssl.SSLContext:
    authority = cluster.data("certificate-authority")
    context = ssl.create_default_context() if authority is None else _trust(*authority)
    if cluster.flag("insecure-skip-tls-verify"):
        if authority is not None:
            raise cluster.error("insecure-skip-tls-verify", "contradicts certificate-authority: set one of them")
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    certificate, key = user.data("client-certificate"), user.data("client-key")
    if (certificate is None) != (key is None):
        missing = "client-certificate" if certificate is None else "client-key"
        raise user.error(missing, "is missing, though the other half of the pair is there")
    if certificate is not None and key is not None:
        _identify(context, certificate, key)
    return context


def _trust(pem: bytes, where: str) -> ssl.SSLContext:
    """Trusts these authorities alone: whom the system trusts must not vouch for a cluster that names its own."""
    try:
        if not pem:
            raise ValueError("without authorities, the standard library would take the system's")
        return ssl.create_default_context(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"{where} holds no usable PEM certificate") from None


def _identify(context: ssl.SSLContext, certificate: tuple[bytes, str], key: tuple[bytes, str]) -> None:
    # OpenSSL takes this pair from files only. A memfd never touches a disk and is gone with this function.
    descriptor = os.memfd_create("fimbria-client", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(certificate[0].rstrip() + b"\n" + key[0])
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(f"{certificate[1]} and {key[1].rsplit(': ', 1)[-1]} are no usable pair: {reason}") from None
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES >> 20} MiB")
    return data
