"""What the probes make of the files they read."""

from __future__ import annotations

from fimbria.kernel import probe

MOUNTS = """\
24 1 0:22 / /sys rw,relatime shared:7 - sysfs sysfs rw
30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/uni\\040fied rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
broken line
"""


def test_the_cgroup2_mount_is_found() -> None:
    assert probe.cgroup2_mount(MOUNTS) == "/sys/fs/cgroup/uni fied"
    assert probe.cgroup2_mount("") is None


def test_capabilities() -> None:
    assert probe.capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n") == 0x1FFFFFFFFFF
    assert probe.capabilities("Name:\tx\n") == 0


def test_each_missing_capability_is_one_sentence() -> None:
    found = probe.problems(caps=0)
    assert [p for p in found if p.startswith("CAP_SYS_ADMIN is missing")]
    assert [p for p in found if p.startswith("CAP_NET_ADMIN is missing")]
    assert all(p.endswith(".") and "\n" not in p for p in found)
    enough = probe.problems(caps=1 << 21 | 1 << 12)
    assert not [p for p in enough if p.startswith("CAP_")]


def test_the_kernel_has_a_version() -> None:
    major, minor = probe.kernel_version()
    assert major >= 5 and minor >= 0
