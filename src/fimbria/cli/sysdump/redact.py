"""Taking secrets out of what is collected. Pure.

Everything that goes into an archive passes through here, by structure where it is JSON and by pattern where it is text.
Rather too much than too little is taken out; only what neither has a telling name nor a telling shape can remain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Final

REDACTED: Final = "<redacted>"
MAX_LINE: Final = 32 << 10  # characters; a longer line is cut
_NAMES: Final = (
    r"pass(?:word|wd|phrase|code)|secret|token|api[-_.]?key|access[-_.]?key|private[-_.]?key|client[-_.]?key|"
    r"signing[-_.]?key|encryption[-_.]?key|shared[-_.]?key|credential|authorization|bearer|(?<![\w.-])(?:set-)?cookie\b|psk\b|"
    r"pwd(?![a-z])|creds?(?![a-z])|(?<![\w-])(?:(?:db|user|admin|root)[-_]?)?(?:pass|pw)(?![\w-])|"
    r"kube-?config|docker-?cfg|dockerconfigjson"
)
_WHOLE: Final = (
    r"certificate|ca-?bundle|client-cert|tls\.(?:crt|key)|ca\.crt|signature|last-applied-configuration|auth$"
)
SECRET_NAME: Final = re.compile(f"{_NAMES}|{_WHOLE}", re.IGNORECASE)
# Names of where a secret is, not the secret.
REFERENCES: Final = frozenset(
    {"secretName", "secretKeyRef", "secretRef", "imagePullSecrets", "serviceAccountToken", "certificateRef",
     "automountServiceAccountToken", "tokenExpirationSeconds"}
)  # fmt: skip

_BLOCK: Final = re.compile(
    rf"^([ \t]*)(-[ \t]+)?[\"']?[\w.-]{{0,64}}?(?:{_NAMES}|{_WHOLE})[\w.-]{{0,64}}[\"']?"
    r"[ \t]*:[ \t]*[|>][-+0-9]*[ \t]*\n"
    r"(?:(?:\1[ \t]+.*|[ \t]*)(?:\n|$))+",
    re.IGNORECASE | re.MULTILINE,
)
_PEM: Final = re.compile(r"-----BEGIN [A-Z0-9 ]{1,64}-----.*?(?:-----END [A-Z0-9 ]{1,64}-----|\Z)", re.DOTALL)
# Repetitions are bounded: no line of a log, however long, may take quadratic time.
_PATTERNS: Final = (
    (re.compile(r"LS0tLS1CRUdJTi[A-Za-z0-9+/=_-]*"), REDACTED),  # base64 of a PEM block
    (re.compile(r"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{8,}+(?:\.[A-Za-z0-9_-]*){1,4}"), REDACTED),  # JWT, RFC 7519
    (re.compile(r"(authorization[\\\"']*\s*[:=]\s*[\\\"']*)[^\n\"'\\]+", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"\b(bearer\s+)[^\s\"'\\]{4,}", re.IGNORECASE), rf"\1{REDACTED}"),
    # Basic, RFC 7617: base64, which a word of a sentence isn't.
    (
        re.compile(r"\b([Bb]asic\s+)(?=[A-Za-z0-9+/]{0,512}(?:[0-9+/=]|[a-z][A-Z]))[A-Za-z0-9+/]{4,}={0,2}"),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"(://)[^\s/@\"'\\<>]+@"), rf"\1{REDACTED}@"),
    (re.compile(r"([?&](?:sig|signature|x-amz-[a-z-]+|code|key)=)[^&\s\"'\\]+", re.IGNORECASE), rf"\1{REDACTED}"),
    (
        re.compile(
            rf"((?:{_NAMES})[\w.-]{{0,64}}\\*[\"']?\s*[:=]\s*)"
            r"(?!<redacted>|\s*[{\[])(?:\\*\"(?:[^\"\\]|\\[^\"])*\\*\"|\\*'[^']*'|[^\s,;&\"'\\}\]]+)",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
    (re.compile(rf"(--?[\w-]{{0,64}}(?:{_NAMES})[\w-]{{0,64}}[ \t]+)(?![-<])\S+", re.IGNORECASE), rf"\1{REDACTED}"),
    # Said in words: of these names anything that follows, of others what isn't a word.
    (
        re.compile(r"\b((?:passwd|pwd|creds?)[ \t]++(?:(?:is|was)[ \t]++)?+)(?![<:=])[^\s\"'\\]+", re.IGNORECASE),
        rf"\1{REDACTED}",
    ),
    (
        re.compile(
            r"\b((?:password|passphrase|credentials?)[ \t]++(?:(?:is|was)[ \t]++)?+)(?![<:=])(?=[^\s\"'\\]{0,512}[0-9])"
            r"[^\s\"'\\]{4,}",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
    # Shapes that their issuers made recognisable: AWS, GitHub, GitLab, Slack, Google, Stripe, npm, Vault, and kubeadm's
    # bootstrap tokens.
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), REDACTED),
    (re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|xox[abeoprs]-|AIza|sk-)[A-Za-z0-9_-]{16,}"), REDACTED),
    (re.compile(r"\b(?:[prs]k_(?:live|test)_|whsec_|npm_|hv[sb]\.)[A-Za-z0-9_-]{8,}"), REDACTED),
    (re.compile(r"\b[a-z0-9]{6}\.[a-z0-9]{16}\b"), REDACTED),
)  # fmt: skip
_SUSPICIOUS: Final = re.compile(
    rf"{_NAMES}|-----BEGIN|LS0tLS1CRUdJTi|eyJ|://|[?&][\w-]+=|AKIA|ASIA|gh[pousr]_|github_pat_|glpat-|xox|AIza|sk-|"
    rf"basic\s|k_live_|k_test_|whsec_|npm_|hv[sb]\.|"
    rf"\b[a-z0-9]{{6}}\.[a-z0-9]{{16}}\b|{_WHOLE}",
    re.IGNORECASE,
)
_PEM_BEGIN: Final = re.compile(r"-----BEGIN [A-Z0-9 ]{1,64}-----")
_PEM_END: Final = re.compile(r"-----END [A-Z0-9 ]{1,64}-----")


def text(value: str) -> str:
    """A text without what looks like a secret."""
    if not _SUSPICIOUS.search(value):
        return value
    value = _BLOCK.sub(lambda m: f"{m[0].splitlines()[0]}\n{m[1]}  {REDACTED}\n", _PEM.sub(REDACTED, value))
    for pattern, replacement in _PATTERNS:
        value = pattern.sub(replacement, value)
    return value


_short = lru_cache(maxsize=4096)(text)


def lines(source: Iterable[str]) -> Iterator[str]:
    """Line by line, so that a long log needn't be in memory. A PEM block may be spread over lines."""
    inside = False
    for whole in source:
        end = _PEM_END.search(whole) if inside else None
        if inside and end is None:
            continue
        line = whole[end.end() :] if end else whole
        if len(line) > MAX_LINE:
            line = f"{line[:MAX_LINE]} ... ({len(line)} characters)"
        inside = _begins_block(line)
        yield text(line.removesuffix("\n")) + ("\n" if whole.endswith("\n") else "")


def _begins_block(line: str) -> bool:
    """Whether a PEM block begins in a line and doesn't end there."""
    starts = [m.end() for m in _PEM_BEGIN.finditer(line)]
    return bool(starts) and not _PEM_END.search(line, starts[-1])


def value(found: Any, name: str = "") -> Any:
    """A JSON value without secrets; `name` is the key it stands under."""
    if name in REFERENCES:
        return found
    hidden = bool(name) and SECRET_NAME.search(name) is not None
    if isinstance(found, dict):
        return {k: _member(found, k, v, hidden) for k, v in found.items()}
    if isinstance(found, list | tuple):
        return [REDACTED if _after_flag(found, i) else value(v, name) for i, v in enumerate(found)]
    if isinstance(found, bool) or found is None or found == "":
        return found
    if hidden:
        return REDACTED
    return _string(found) if isinstance(found, str) else found


def _member(parent: dict[str, Any], key: str, found: Any, hidden: bool) -> Any:
    if hidden and key not in REFERENCES and not isinstance(found, dict | list | tuple):
        return value(found, "secret")
    named = parent.get("name", parent.get("key"))
    if key == "value" and isinstance(named, str) and SECRET_NAME.search(named):
        return value(found, "secret")  # {"name": "TOKEN", "value": ...}: environment, headers, settings
    return value(found, "secret" if hidden and key not in REFERENCES else key)


def _after_flag(items: list[Any] | tuple[Any, ...], at: int) -> bool:
    """Whether an argument is the value of a flag with a secret's name: ["--token", "x"]."""
    flag = items[at - 1] if at else None
    return (
        isinstance(flag, str)
        and isinstance(items[at], str)
        and flag.startswith("-")
        and "=" not in flag
        and SECRET_NAME.search(flag) is not None
    )


def _string(found: str) -> str:
    if len(found) < 256:
        return _short(found)
    if found[:1] in "{[":
        try:
            inner = json.loads(found)
        except ValueError:
            return text(found)
        return json.dumps(value(inner))  # an object within a text, as tools keep in annotations
    return text(found)
