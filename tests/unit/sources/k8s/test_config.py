"""Kubeconfigs good and bad: each bad one gives one sentence with the file and the field."""

import base64
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fimbria.sources.k8s.config import ConfigError, Token, from_kubeconfig, in_cluster, load

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    where = tmp_path_factory.mktemp("pki")
    cert, key = where / "tls.crt", where / "tls.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=fimbria-test", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(cluster: Any = None, user: Any = None, **top: Any) -> Path:
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "main",
            "contexts": [{"name": "main", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
            "clusters": [{"name": "c", "cluster": cluster or {"server": "https://10.0.0.1:6443/"}}],
            "users": [{"name": "u", "user": user if user is not None else {"token": "secret"}}],
            **top,
        }
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(document))
        return path

    return write


def b64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_token_and_namespace(make: Make) -> None:
    config = from_kubeconfig(make())
    assert config.server == "https://10.0.0.1:6443"
    assert config.namespace == "team"
    assert config.token is not None
    assert config.token.get() == "secret"
    assert config.tls is not None
    assert config.tls.verify_mode is ssl.CERT_REQUIRED
    assert "secret" not in repr(config)


def test_certificates_as_data(make: Make, pair: tuple[Path, Path]) -> None:
    cert, key = pair
    cluster = {"server": "https://a", "certificate-authority-data": b64(cert), "tls-server-name": "kubernetes"}
    config = from_kubeconfig(make(cluster, {"client-certificate-data": b64(cert), "client-key-data": b64(key)}))
    assert config.tls is not None
    assert "fimbria-test" in str(config.tls.get_ca_certs())
    assert config.tls_server_name == "kubernetes"
    assert config.token is None


def test_certificates_as_files_relative_to_the_kubeconfig(make: Make, pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "pki").mkdir()
    for source, name in zip(pair, ("tls.crt", "tls.key"), strict=True):
        (tmp_path / "pki" / name).write_bytes(source.read_bytes())
    config = from_kubeconfig(
        make(
            {"server": "https://a", "certificate-authority": "pki/tls.crt"},
            {"client-certificate": "pki/tls.crt", "client-key": "pki/tls.key"},
        )
    )
    assert config.tls is not None
    assert config.tls.get_ca_certs()


def test_authorities_of_a_cluster_are_the_only_ones(make: Make, pair: tuple[Path, Path]) -> None:
    config = from_kubeconfig(make({"server": "https://a", "certificate-authority-data": b64(pair[0])}))
    assert config.tls is not None
    assert [c["subject"] for c in config.tls.get_ca_certs()] == [((("commonName", "fimbria-test"),),)]
    assert config.tls.verify_mode is ssl.CERT_REQUIRED
    assert config.tls.check_hostname


def test_verification_can_be_switched_off(make: Make) -> None:
    config = from_kubeconfig(make({"server": "https://a", "insecure-skip-tls-verify": True}))
    assert config.tls is not None
    assert config.tls.verify_mode is ssl.CERT_NONE


def test_plain_http_has_no_tls(make: Make) -> None:
    assert from_kubeconfig(make({"server": "http://127.0.0.1:8001"}, {})).tls is None


def test_other_context_and_other_server(make: Make) -> None:
    contexts = [
        {"name": "main", "context": {"cluster": "missing", "user": "u"}},
        {"name": "other", "context": {"cluster": "c"}},
    ]
    config = from_kubeconfig(make(contexts=contexts), context="other", server="https://192.0.2.1:6443")
    assert config.server == "https://192.0.2.1:6443"
    assert config.namespace == "default"
    assert config.token is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"user": {"exec": {"command": "aws"}}}, "user 'u' wants a credential plugin (exec), which isn't supported"),
        ({"user": {"auth-provider": {"name": "gcp"}}}, "user 'u' wants an auth-provider"),
        ({"user": {"username": "admin", "password": "x"}}, "user 'u' wants a user name and password"),
        ({"user": {"token": "a", "as": "root"}}, "user 'u' wants impersonation (as)"),
        ({"user": {"token": 5}}, "user 'u': token must be text, not int"),
        ({"user": {"token": "a\nb"}}, "user 'u': token contains characters"),
        ({"user": {"tokenFile": "nope"}}, "user 'u': tokenFile is unusable"),
        ({"user": {"client-certificate": "nope"}}, "user 'u': client-certificate is unusable: can't read"),
        ({"user": {"client-key-data": "e30="}}, "user 'u': client-certificate is missing"),
        ({"user": {"client-key-data": "e30=", "client-certificate-data": "e30="}}, "are no usable pair"),
        ({"cluster": {"server": "10.0.0.1"}}, "cluster 'c': server: '10.0.0.1' is no http or https URL"),
        ({"cluster": {"server": "https://a:b"}}, "'https://a:b' is no http or https URL"),
        ({"cluster": {"certificate-authority-data": "%%"}}, "cluster 'c'"),
        ({"cluster": {"server": "https://a", "certificate-authority-data": "%%"}}, "data isn't valid base64"),
        ({"cluster": {"server": "https://a", "certificate-authority-data": "e30="}}, "no usable PEM certificate"),
        ({"cluster": {"server": "https://a", "proxy-url": "http://p"}}, "cluster 'c': proxy-url isn't supported"),
        ({"cluster": {"server": "https://a", "insecure-skip-tls-verify": "yes"}}, "must be true or false"),
        ({"current-context": ""}, "no current-context is set"),
        ({"current-context": "nope"}, "no context named 'nope' (there are: main)"),
        ({"clusters": None}, "no cluster named 'c' (there are: none)"),
        ({"clusters": "x"}, "clusters must be a list"),
        ({"users": [{"name": "u", "user": "x"}]}, "user 'u' must be a mapping"),
        ({"contexts": [{"name": "main", "context": {"user": "u"}}]}, "context 'main': cluster is missing"),
    ],
)
def test_bad_entries_are_named(make: Make, broken: dict[str, Any], message: str) -> None:
    path = make(**broken)
    with pytest.raises(ConfigError) as caught:
        from_kubeconfig(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML (line"),
        ("- a", "not a kubeconfig"),
        ("\x00", "not valid YAML"),
        ("", "not a kubeconfig"),
    ],
)
def test_files_that_are_no_kubeconfig(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)) as caught:
        from_kubeconfig(path)
    assert message in str(caught.value)


def test_no_private_key_reaches_a_disk(make: Make, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = ssl.SSLContext.load_cert_chain

    def spy(self: ssl.SSLContext, certfile: str, *args: Any, **options: Any) -> None:
        opened.append(str(Path(certfile).resolve()))
        real(self, certfile, *args, **options)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    from_kubeconfig(make(user={"client-certificate-data": b64(pair[0]), "client-key-data": b64(pair[1])}))
    assert len(opened) == 1
    assert "memfd:" in opened[0]


# --- in a pod, and choosing --------------------------------------------------------------------------------------


@pytest.fixture
def account(tmp_path: Path, pair: tuple[Path, Path]) -> Path:
    where = tmp_path / "account"
    where.mkdir()
    (where / "token").write_text("projected\n")
    (where / "ca.crt").write_bytes(pair[0].read_bytes())
    (where / "namespace").write_text("kube-system")
    return where


def test_in_cluster(account: Path) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    config = in_cluster(environ=environ, service_account=account)
    assert config.server == "https://[fd00::1]:6443"
    assert config.namespace == "kube-system"
    assert config.token is not None
    assert config.token.get() == "projected"
    direct = in_cluster(server="https://192.0.2.7:6443", environ={}, service_account=account)
    assert direct.server == "https://192.0.2.7:6443"


def test_in_cluster_names_what_is_missing(account: Path) -> None:
    with pytest.raises(ConfigError, match="KUBERNETES_SERVICE_HOST"):
        in_cluster(environ={}, service_account=account)
    (account / "ca.crt").write_bytes(b"")
    with pytest.raises(ConfigError, match="no usable PEM"):
        in_cluster(environ={"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, service_account=account)
    (account / "ca.crt").unlink()
    with pytest.raises(ConfigError, match=r"can't read .*ca\.crt"):
        in_cluster(environ={"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, service_account=account)


def test_order_of_sources(make: Make, account: Path, tmp_path: Path) -> None:
    path = make()
    pod = {"KUBERNETES_SERVICE_HOST": "10.9.9.9", "HOME": str(tmp_path / "nobody")}
    assert load(path, environ=pod, service_account=account).server == "https://10.0.0.1:6443"
    assert load(environ={**pod, "KUBECONFIG": str(path)}, service_account=account).namespace == "team"
    assert load(environ=pod, service_account=account).server == "https://10.9.9.9:443"
    home = tmp_path / "home" / ".kube"
    home.mkdir(parents=True)
    (home / "config").write_bytes(path.read_bytes())
    assert load(environ={"HOME": str(home.parent)}).namespace == "team"
    with pytest.raises(ConfigError, match="no way to reach a Kubernetes API"):
        load(environ={"HOME": str(tmp_path / "nobody")})
    with pytest.raises(ConfigError, match="several files"):
        load(environ={"KUBECONFIG": f"{path}:{path}"})


def test_token_file_is_read_again_and_survives_a_gap(tmp_path: Path) -> None:
    now = 0.0
    path = tmp_path / "token"
    path.write_text("one")
    token = Token(path=path, max_age=60, clock=lambda: now)
    assert token.get() == "one"
    path.write_text("two")
    assert token.get() == "one"
    now = 61.0
    assert token.get() == "two"
    path.unlink()
    now = 200.0
    assert token.get() == "two"
    path.write_text("three")
    token.expire()
    assert token.get() == "three"


def test_rotated_authority_is_taken_over(make: Make, pair: tuple[Path, Path], tmp_path: Path) -> None:
    authority = tmp_path / "ca.crt"
    authority.write_bytes(pair[0].read_bytes())
    trust = from_kubeconfig(make({"server": "https://10.0.0.1", "certificate-authority": str(authority)})).trust
    assert trust is not None
    first = trust.get()
    authority.write_bytes(pair[0].read_bytes() * 2)
    assert trust.get() is first, "not looked at before its time"
    trust.expire()
    second = trust.get()
    assert second is not first
    authority.write_bytes(b"half a certif")
    trust.expire()
    assert trust.get() is second, "what can't be used isn't"
    trust.expire()
    assert trust.get() is second
