"""Identity labels: what a pod is called, and what of it counts."""

from __future__ import annotations

import pickle

import pytest

from fimbria.model.labels import DEFAULT_FILTER, LabelFilter, Labels, pod_labels


def test_equal_labels_are_one_object() -> None:
    assert Labels({"k8s:a": "1", "k8s:b": "2"}) is Labels({"k8s:b": "2", "k8s:a": "1"})
    assert pickle.loads(pickle.dumps(Labels({"k8s:a": "1"}))) is Labels({"k8s:a": "1"})


def test_texts_and_back() -> None:
    labels = Labels({"reserved:host": "", "k8s:app": "web=1"})
    assert labels.texts() == ("k8s:app=web=1", "reserved:host")
    assert Labels.parse(labels.texts()) is labels


def test_canonical_text_is_unambiguous() -> None:
    assert Labels({"k8s:a": "bc"}).canonical() != Labels({"k8s:ab": "c"}).canonical()
    assert Labels({"k8s:a": "", "k8s:b": ""}).canonical() != Labels({"k8s:a": "k8s:b"}).canonical()


def test_pod_labels_in_the_words_of_policies() -> None:
    assert pod_labels("shop", {"app": "web"}, {"team": "red"}, "robot", "east") == {
        "k8s:app": "web",
        "k8s:io.kubernetes.pod.namespace": "shop",
        "k8s:io.cilium.k8s.namespace.labels.team": "red",
        "k8s:io.cilium.k8s.policy.serviceaccount": "robot",
        "k8s:io.cilium.k8s.policy.cluster": "east",
    }


@pytest.mark.parametrize(
    "forged",
    [
        "io.kubernetes.pod.namespace",
        "io.cilium.k8s.policy.cluster",
        "io.cilium.k8s.policy.serviceaccount",
        "io.cilium.k8s.namespace.labels.team",
    ],
)
def test_a_pod_cannot_forge_what_the_cluster_says_of_it(forged: str) -> None:
    assert "evil" not in pod_labels("shop", {forged: "evil"}, {}, "", "default").values()


@pytest.mark.parametrize(
    ("key", "relevant"),
    [
        ("k8s:app", True),
        ("k8s:app.kubernetes.io/name", True),
        ("k8s:example.com/team", True),
        ("k8s:io.kubernetes.pod.namespace", True),
        ("k8s:io.kubernetes.pod.name", False),
        ("k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name", True),
        ("k8s:io.cilium.k8s.policy.serviceaccount", True),
        ("reserved:host", True),
        ("k8s:pod-template-hash", False),
        ("k8s:controller-revision-hash", False),
        ("k8s:statefulset.kubernetes.io/pod-name", False),
        ("k8s:apps.kubernetes.io/pod-index", False),
        ("k8s:batch.kubernetes.io/job-completion-index", False),
        ("k8s:batch.kubernetes.io/controller-uid", False),
        ("k8s:job-name", False),
        ("k8s:job-names", True),
        ("k8s:beta.kubernetes.io/arch", False),
        ("k8s:topology.kubernetes.io/zone", False),
    ],
)
def test_default_filter(key: str, relevant: bool) -> None:
    assert DEFAULT_FILTER.relevant(key) is relevant


def test_an_include_makes_it_an_allow_list() -> None:
    some = LabelFilter.of(["team", "k8s:job-name", "!team-secret"])
    assert some.relevant("k8s:team") and some.relevant("k8s:team-a") and some.relevant("k8s:job-name")
    assert not some.relevant("k8s:team-secret") and not some.relevant("k8s:app")
    assert some.relevant("k8s:io.kubernetes.pod.namespace") and some.relevant("k8s:app.kubernetes.io/name")


def test_an_exclude_adds_to_the_default() -> None:
    some = LabelFilter.of(["!version"])
    assert some.relevant("k8s:app")
    assert not some.relevant("k8s:version") and not some.relevant("k8s:pod-template-hash")


def test_a_bad_pattern_is_named() -> None:
    with pytest.raises(ValueError, match=r"label pattern 'a\(' is not a regular expression"):
        LabelFilter.of(["a("])


def test_applying_leaves_what_counts() -> None:
    pod = pod_labels("shop", {"app": "web", "pod-template-hash": "12"}, {}, "")
    assert DEFAULT_FILTER.apply(pod).texts() == (
        "k8s:app=web",
        "k8s:io.cilium.k8s.policy.cluster=default",
        "k8s:io.kubernetes.pod.namespace=shop",
    )
