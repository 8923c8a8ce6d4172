"""Secrets in every likely place and shape are taken out; what helps stays."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.cli.sysdump import redact
from fimbria.cli.sysdump.redact import REDACTED

PEM = "-----BEGIN RSA PRIVATE KEY-----\nhunter2MIIE\nhunter2==\n-----END RSA PRIVATE KEY-----"
JWT = "eyJhbGciOiJSUzI1NiIsImtpZCI6IiJ9.eyJzdWIiOiJodW50ZXIyIn0.hunter2-signature_x"
TEXTS = [
    PEM,
    json.dumps({"data": PEM}),
    f"the token {JWT} was refused",
    "Authorization: Basic hunter2aHVudGVyMg==",
    "authorization='Basic hunter2 hunter2'",
    "GET with Bearer hunter2hunter2",
    "postgres://admin:hunter2@db:5432/x",
    "https://hunter2@git.example/x",
    "password=hunter2",
    "DB_PASSWORD: hunter2",
    'password = "hunter2 and hunter2"',
    "{'api_key': 'hunter2'}",
    '{"clientSecret": "hunter2, hunter2"}',
    json.dumps(json.dumps({"aws_secret_access_key": "hunter2 x"})),
    "agent --token hunter2 --x",
    "agent --bootstrap-token=hunter2",
    "https://x.blob/y?sig=hunter2&x=1",
    "https://s3/x?X-Amz-Signature=hunter2",
    "password: |\n  hunter2\n  hunter2\nnext: 1",
    "  - clientSecret: >-\n      hunter2\n\n      hunter2\n",
    "client-key-data: LS0tLS1CRUdJTihunter2",
    "LS0tLS1CRUdJTiBDRVJUSUhunter2",
    "pwd=hunter2 x",
    "connecting as a, PWD: hunter2",
    '{"dbPwd": "hunter2"}',
    "MYSQL_PWD=hunter2",
    "passwd hunter2 refused",
    "the passwd is hunter2",
    "passwd='hunter2 hunter2'",
    "creds=a:hunter2",
    "creds a:hunter2",
    "registryCreds: 'a:hunter2'",
    "cred=hunter2",
    "db_pass=hunter2 pass=hunter2 pw=hunter2",
    "password hunter2 is wrong",
    "authorization Basic hunter2aHVudGVyMg==",
    '{"Authorization":["Basic hunter2aHVudGVyMg=="]}',
    '{"Authorization":["Bearer hunter2hunter2"]}',
    "map[Authorization:[Basic hunter2aHVudGVyMg==] Accept:[*/*]]",
    "proxy-authorization: Digest username=a, response=hunter2",
    "-----BEGIN OPENSSH PRIVATE KEY-----\\nhunter2\\n-----END OPENSSH PRIVATE KEY-----",
]
SHAPES = [
    "sk_live_" + "d" * 24, "rk_test_" + "d" * 24, "whsec_" + "e" * 24, "npm_" + "f" * 36, "hvs.CAES" + "g" * 24,
    "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0", "ASIA" + "B" * 16,
    "AKIA" + "A" * 16, "ghp_" + "b" * 36, "xoxb-" + "1" * 20, "abcdef.0123456789abcdef", "AIza" + "c" * 35, JWT,
]  # fmt: skip


@pytest.mark.parametrize("found", TEXTS)
def test_texts(found: str) -> None:
    by_line = "".join(redact.lines(found.splitlines(keepends=True)))
    blocks = found.startswith(("password: |", "  - clientSecret: >"))  # of YAML: not in logs, which go line by line
    for clean in (redact.text(found), redact.text(found) if blocks else by_line, redact.value({"m": found})["m"]):
        assert "hunter2" not in clean, clean
        assert REDACTED in clean


@pytest.mark.parametrize("found", SHAPES)
def test_shapes_are_recognised_without_a_name(found: str) -> None:
    assert redact.text(f"got {found} from it") == f"got {REDACTED} from it"


@pytest.mark.parametrize(
    "found",
    [
        {"password": "hunter2"},
        {"spec": {"apiToken": "hunter2"}},
        {"pin_passcode": 12345},
        {"secrets": ["hunter2", {"value": "hunter2"}]},
        {"credentials": {"user": "a", "value": "hunter2"}},
        {"env": [{"name": "DB_PASSWORD", "value": "hunter2"}]},
        {"httpHeaders": [{"name": "Authorization", "value": "hunter2"}]},
        {"args": ["--token", "hunter2"]},
        {"args": ["--token=hunter2"]},
        {"annotations": {"kubectl.kubernetes.io/last-applied-configuration": '{"x":"hunter2"}'}},
        {"annotations": {"note": json.dumps({"a": {"password": "hunter2"}, "pad": "x" * 300})}},
        {"annotations": {"x/y": f"{PEM}"}},
        {"webhooks": [{"clientConfig": {"caBundle": "hunter2"}}]},
        {"data": {"tls.key": "hunter2", "kubeconfig": "hunter2"}},
        {"data": {"config.yaml": "listen: 1\npassword: hunter2\n" + "x: 1\n" * 100}},
    ],
)
def test_values(found: object) -> None:
    clean = json.dumps(redact.value(found))
    assert "hunter2" not in clean
    assert "12345" not in clean
    assert REDACTED in clean


def test_what_helps_stays() -> None:
    kept = {
        "volumes": [{"name": "v", "secret": {"secretName": "tls", "defaultMode": 420}}],
        "env": [{"name": "FIMBRIA_ROUTING", "value": "native"}],
        "automountServiceAccountToken": False,
        "key": {"prefix": "10.0.0.1/32", "addr": "fd00::1"},
        "labels": ["k8s:app=web", "k8s:io.kubernetes.pod.namespace=shop"],
        "message": "dropped 10.0.0.1:80 -> [fd00::1]:443 POLICY_DENIED by NetworkPolicy shop/web (ingress[0])",
        "server": "https://10.96.0.1:443",
        "rows": 12,
    }
    clean = redact.value(kept)
    assert clean["volumes"][0]["secret"]["secretName"] == "tls"
    assert {k: v for k, v in clean.items() if k != "volumes"} == {k: v for k, v in kept.items() if k != "volumes"}
    for line in (
        "basic settings of this node", "Basic authentication is off", "12 packets bypass: 3 XDP_PASS=4",
        "the password is wrong", "compass=3", "credit=4", "password or token", "asks for credentials of user a",
    ):  # fmt: skip
        assert redact.text(line) == line
    line = "2026-11-23T15:00:00Z INFO agent: 12 rows of ipcache written in 3.1 ms; mark=0xf1 key_size=24"
    assert redact.text(line) == line


def test_a_block_over_many_lines_of_a_log() -> None:
    log = ["begin\n", "x: -----BEGIN EC PRIVATE KEY-----\n", "hunter2\n", "hunter2\n", "-----END EC PRIVATE KEY-----\n"]
    clean = "".join(redact.lines([*log, "after\n"]))
    assert clean.startswith("begin\n") and clean.endswith("after\n")
    assert "hunter2" not in clean
    assert "hunter2" not in "".join(redact.lines([*log[:3], "hunter2\n"])), "one that never ends"


def test_long_lines_are_cut() -> None:
    (line,) = redact.lines(["x" * 100_000 + "\n"])
    assert len(line) < redact.MAX_LINE + 100
    assert line.endswith("(100001 characters)\n")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=20), lambda c: st.lists(c, max_size=3)
                    | st.dictionaries(st.text(max_size=8), c, max_size=3), max_leaves=12))  # fmt: skip
def test_any_value_keeps_its_shape_and_needs_no_second_round(found: object) -> None:
    once = redact.value(found)
    assert type(once) in (type(found), str)
    assert redact.value(once) == once


@given(st.text(alphabet="ab:=\"'\\ \n-|{}[]<>token", max_size=60))
def test_text_is_stable(found: str) -> None:
    once = redact.text(found)
    assert redact.text(once) == once


@pytest.mark.parametrize(
    "piece",
    [
        "token",
        "a",
        "-",
        "--token",
        "eyJ",
        "://",
        '"',
        "\\",
        "-----BEGIN A-----",
        "password: |\n",
        "Basic ",
        "passwd ",
        "pwd",
        "password is ",
        "sk_live_",
        "pass=",
    ],
)
def test_no_text_takes_long(piece: str) -> None:
    began = time.process_time()
    redact.text("token " + piece * (redact.MAX_LINE // len(piece)))
    assert time.process_time() - began < 3.0
