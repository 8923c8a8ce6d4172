"""Identity labels, as users of Cilium know them, and which labels of a pod take part in its identity.

A label's key carries its source: `k8s:app`, `k8s:io.kubernetes.pod.namespace`, `reserved:host`. Two pods whose filtered
labels are equal have the same identity, so these labels are all that a policy can say about a peer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

NAMESPACE: Final = "k8s:io.kubernetes.pod.namespace"
NAMESPACE_LABELS: Final = "k8s:io.cilium.k8s.namespace.labels."
CLUSTER: Final = "k8s:io.cilium.k8s.policy.cluster"
SERVICE_ACCOUNT: Final = "k8s:io.cilium.k8s.policy.serviceaccount"
DEFAULT_CLUSTER: Final = "default"

_EMPTY: Final[dict[str, str]] = {}


class Labels(Mapping[str, str]):
    """A frozen, interned mapping from sourced key to value; ordered by key, so its text is canonical.

    Equal labels are the same object as long as anybody holds one, which makes comparing and hashing cheap and lets
    thousands of pods share a few label sets.
    """

    __slots__ = ("__weakref__", "_hash", "_items", "_map")

    _items: tuple[tuple[str, str], ...]
    _map: dict[str, str]
    _hash: int

    def __new__(cls, items: Mapping[str, str] = _EMPTY) -> Labels:
        key = tuple(sorted(items.items()))
        known = _interned.get(key)
        if known is None:
            known = super().__new__(cls)
            known._items = tuple((sys.intern(k), sys.intern(v)) for k, v in key)
            known._map = dict(known._items)
            known._hash = hash(known._items)
            _interned[known._items] = known
        return known

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Labels:
        """From `source:key=value` texts; a text without `=` has the empty value."""
        pairs = (text.partition("=") for text in texts)
        return cls({key: value for key, _, value in pairs})

    def __getitem__(self, key: str) -> str:
        return self._map[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._map)

    def __len__(self) -> int:
        return len(self._map)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Mapping) and self._map == dict(other))

    def __reduce__(self) -> tuple[type[Labels], tuple[dict[str, str]]]:
        return Labels, (self._map,)

    def texts(self) -> tuple[str, ...]:
        """`source:key=value`, sorted; without the `=` where the value is empty."""
        return tuple(f"{k}={v}" if v else k for k, v in self._items)

    def canonical(self) -> bytes:
        """An unambiguous text to hash: keys and values length-prefixed, in the order of the keys."""
        parts = (part.encode() for item in self._items for part in item)
        return b"".join(len(part).to_bytes(4) + part for part in parts)

    def __repr__(self) -> str:
        return f"Labels({', '.join(self.texts())})"


_interned: WeakValueDictionary[tuple[tuple[str, str], ...], Labels] = WeakValueDictionary()

# Labels that differ between pods that do the same job would give every pod an identity of its own.
_DEFAULT_EXCLUDES: Final = (
    r"io\.kubernetes", r"kubernetes\.io", r"[^:]*\.kubernetes\.io", r"k8s\.io", r"[^:]*\.k8s\.io",
    r"pod-template-", r"controller-revision-hash$", r"controller-uid$", r"job-name$", r"service\.istio\.io/canonical-",
)  # fmt: skip
_ALWAYS: Final = (
    r"reserved:.*", r"k8s:io\.kubernetes\.pod\.namespace$", r"k8s:io\.cilium\.k8s\.namespace\.labels\.",
    r"k8s:io\.cilium\.k8s\.policy\.(cluster|serviceaccount)$", r"k8s:app\.kubernetes\.io/",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LabelFilter:
    """Which labels are security-relevant.

    Patterns are regular expressions anchored at the start of the key, with or without its source (`k8s:app` and `app`
    both match `k8s:app`). Without includes everything counts but the default excludes (Kubernetes' own bookkeeping).
    With any include only what an include matches counts. Namespace, cluster, service account, `app.kubernetes.io/*` and
    reserved labels always count.
    """

    _include: re.Pattern[str] | None
    _exclude: re.Pattern[str]

    @classmethod
    def of(cls, patterns: Iterable[str] = ()) -> LabelFilter:
        """From a user's list, where a leading `!` excludes; excludes add to the default ones and win over includes.

        Raises ValueError naming a pattern that isn't a regular expression.
        """
        includes: list[str] = []
        excludes: list[str] = []
        for pattern in patterns:
            (excludes if pattern.startswith("!") else includes).append(pattern.removeprefix("!"))
        for pattern in (*includes, *excludes):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"label pattern {pattern!r} is not a regular expression: {error}") from None
        # An include is the user's word over the defaults: who names `job-name` wants it.
        return cls(
            _any(includes) if includes else None, _any(excludes if includes else (*_DEFAULT_EXCLUDES, *excludes))
        )

    def relevant(self, key: str) -> bool:
        """Whether a sourced key (`k8s:app`) takes part in identities."""
        if _always.match(key):
            return True
        bare = key.partition(":")[2]
        if self._exclude.match(key) or self._exclude.match(bare):
            return False
        return self._include is None or bool(self._include.match(key) or self._include.match(bare))

    def apply(self, labels: Mapping[str, str]) -> Labels:
        return Labels({key: value for key, value in labels.items() if self.relevant(key)})


def _any(patterns: Iterable[str]) -> re.Pattern[str]:
    texts = [f"(?:{pattern})" for pattern in patterns]
    return re.compile("|".join(texts) if texts else r"(?!)")


_always = _any(_ALWAYS)
DEFAULT_FILTER: Final = LabelFilter.of()


def pod_labels(  # the words of a pod that policies may use
    namespace: str,
    labels: Mapping[str, str],
    namespace_labels: Mapping[str, str],
    service_account: str = "",
    cluster: str = DEFAULT_CLUSTER,
) -> dict[str, str]:
    """All labels of a pod with their sources, not filtered: `LabelFilter.apply` gives the identity's."""
    # The pod's own labels come first: what follows can't be forged by labelling a pod.
    sourced = {f"k8s:{key}": value for key, value in labels.items()}
    sourced = {key: value for key, value in sourced.items() if not key.startswith(NAMESPACE_LABELS)}
    sourced.pop(SERVICE_ACCOUNT, None)
    sourced.update({f"{NAMESPACE_LABELS}{key}": value for key, value in namespace_labels.items()})
    sourced[NAMESPACE] = namespace
    sourced[CLUSTER] = cluster
    if service_account:
        sourced[SERVICE_ACCOUNT] = service_account
    return sourced
