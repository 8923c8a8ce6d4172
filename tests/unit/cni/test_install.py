"""Installation of the CNI plugin and its configuration: atomic, repeatable, and clear about what it can't do."""

import asyncio
import errno
import json
import logging
import os
import stat
import subprocess
from pathlib import Path

import pytest

from fimbria.agent import install
from fimbria.agent.install import (
    CONF_NAME,
    CONFIG,
    InstallError,
    config_problem,
    install_cni,
    install_config,
    keep_config,
    remove_config,
)
from fimbria.sources.cni.spec import SUPPORTED


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "plugin"
    path.write_bytes(b"\x7fELF something")
    return path


def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "opt/cni/bin", tmp_path / "etc/cni/net.d"


def test_a_fresh_node(tmp_path: Path, plugin: Path) -> None:
    bin_dir, conf_dir = folders(tmp_path)
    assert install_cni(bin_dir, conf_dir, plugin) == ()
    binary = bin_dir / "fimbria-cni"
    assert binary.read_bytes() == plugin.read_bytes()
    assert stat.S_IMODE(binary.stat().st_mode) == 0o755
    assert json.loads((conf_dir / CONF_NAME).read_bytes()) == CONFIG
    assert sorted(os.listdir(bin_dir)) == ["fimbria-cni"]
    assert sorted(os.listdir(conf_dir)) == [CONF_NAME]


def test_the_configuration_serves_old_and_new_runtimes() -> None:
    """Old ones go by cniVersion (containerd 1.6 knows 1.0.0 at most), new ones take the highest of cniVersions."""
    assert {CONFIG["cniVersion"], *CONFIG["cniVersions"]} <= set(SUPPORTED)
    assert SUPPORTED.index(CONFIG["cniVersion"]) <= SUPPORTED.index("1.0.0")
    assert CONFIG["cniVersions"][-1] == SUPPORTED[-1]


def test_again_touches_nothing(tmp_path: Path, plugin: Path) -> None:
    bin_dir, conf_dir = folders(tmp_path)
    install_cni(bin_dir, conf_dir, plugin)
    paths = (bin_dir / "fimbria-cni", conf_dir / CONF_NAME)
    before = [p.stat().st_ino for p in paths]
    install_cni(bin_dir, conf_dir, plugin)
    assert [p.stat().st_ino for p in paths] == before


@pytest.mark.parametrize("harm", ["content", "mode", "dangling", "gone"])
def test_what_was_changed_is_put_right(tmp_path: Path, plugin: Path, harm: str) -> None:
    bin_dir, conf_dir = folders(tmp_path)
    install_cni(bin_dir, conf_dir, plugin)
    binary = bin_dir / "fimbria-cni"
    if harm == "content":
        binary.write_bytes(b"old")
    elif harm == "mode":
        binary.chmod(0o644)
    else:
        binary.unlink()
    if harm == "dangling":
        binary.symlink_to("nowhere")
    install_cni(bin_dir, conf_dir, plugin)
    assert binary.read_bytes() == plugin.read_bytes()
    assert not binary.is_symlink()
    assert stat.S_IMODE(binary.stat().st_mode) == 0o755


def test_leftovers_of_a_killed_installation_are_removed(tmp_path: Path, plugin: Path) -> None:
    bin_dir, conf_dir = folders(tmp_path)
    bin_dir.mkdir(parents=True)
    (bin_dir / ".fimbria-cni.4711").write_bytes(b"half")
    install_cni(bin_dir, conf_dir, plugin)
    assert os.listdir(bin_dir) == ["fimbria-cni"]


def test_a_binary_that_is_running_is_replaced(tmp_path: Path, plugin: Path) -> None:
    """Writing to it would be refused with ETXTBSY."""
    bin_dir, conf_dir = folders(tmp_path)
    bin_dir.mkdir(parents=True)
    old = bin_dir / "fimbria-cni"
    old.write_bytes(Path("/bin/sleep").read_bytes())
    old.chmod(0o755)
    with subprocess.Popen([old, "60"]) as process:
        try:
            with pytest.raises(OSError, match="busy") as caught:
                old.open("wb").close()
            assert caught.value.errno == errno.ETXTBSY
            install_cni(bin_dir, conf_dir, plugin)
            assert old.read_bytes() == plugin.read_bytes()
            assert process.poll() is None
        finally:
            process.kill()


def test_another_configuration_that_the_runtime_prefers(
    tmp_path: Path, plugin: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bin_dir, conf_dir = folders(tmp_path)
    conf_dir.mkdir(parents=True)
    for name in ("00-other.conflist", "01-old.conf", "02-x.json", "03-off.conflist.bak", "10-later.conflist"):
        (conf_dir / name).write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert install_cni(bin_dir, conf_dir, plugin) == ("00-other.conflist", "01-old.conf", "02-x.json")
    assert "00-other.conflist, 01-old.conf, 02-x.json" in caplog.text
    assert (conf_dir / "00-other.conflist").read_text() == "{}"  # others' files stay as they are


def test_a_folder_that_cannot_be_written(tmp_path: Path, plugin: Path) -> None:
    """Sysfs refuses new files also to root, and needs no mount."""
    with pytest.raises(InstallError, match=r"/sys/kernel/fimbria.* can't be written \(--cni-bin-dir\): ") as caught:
        install_cni(Path("/sys/kernel/fimbria"), tmp_path, plugin)
    assert caught.value.errno in (errno.EPERM, errno.EACCES, errno.EROFS)
    with pytest.raises(InstallError, match=r"--cni-conf-dir"):
        install_cni(tmp_path / "bin", Path("/sys/kernel/fimbria"), plugin)
    assert not (tmp_path / CONF_NAME).exists()  # no configuration before its plugin is there


def test_something_else_in_the_way(tmp_path: Path, plugin: Path) -> None:
    bin_dir, conf_dir = folders(tmp_path)
    (bin_dir / "fimbria-cni").mkdir(parents=True)
    with pytest.raises(InstallError, match="fimbria-cni can't be written"):
        install_cni(bin_dir, conf_dir, plugin)
    assert os.listdir(bin_dir) == ["fimbria-cni"]
    assert not conf_dir.exists()


def test_a_package_without_the_plugin(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match="missing can't be read"):
        install_cni(tmp_path / "a", tmp_path / "b", tmp_path / "missing")


# --- other plugins' configurations ------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_taking_over_and_giving_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, text in (("00-a.conf", "A"), ("10-b.conflist", "B"), ("99-loopback.json", "L"), ("notes.txt", "N")):
        (tmp_path / name).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert install_config(tmp_path, exclusive=True) == ()
    assert caplog.text.count("is set aside") == 3
    aside = ["00-a.conf.fimbria_bak", CONF_NAME, "10-b.conflist.fimbria_bak", "99-loopback.json.fimbria_bak"]
    assert names(tmp_path) == [*aside, "notes.txt"]
    assert config_problem(tmp_path, exclusive=True) == ""

    # Its installer writes it again: the newer one counts.
    (tmp_path / "10-b.conflist").write_text("B2")
    assert "10-b.conflist" in config_problem(tmp_path, exclusive=True)
    assert config_problem(tmp_path) == ""
    install_config(tmp_path, exclusive=True)
    assert names(tmp_path) == [*aside, "notes.txt"]

    # One that is there again at the end is in force, and not overwritten.
    (tmp_path / "00-a.conf").write_text("A2")
    assert remove_config(tmp_path) == ("10-b.conflist", "99-loopback.json")
    assert names(tmp_path) == ["00-a.conf", "00-a.conf.fimbria_bak", "10-b.conflist", "99-loopback.json", "notes.txt"]
    assert (tmp_path / "10-b.conflist").read_text() == "B2"
    assert (tmp_path / "00-a.conf").read_text() == "A2"


def test_ours_is_there_before_theirs_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment is the folder without a configuration."""
    (tmp_path / "10-b.conflist").write_text("B")
    seen: list[list[str]] = []
    rename = Path.rename

    def spied(self: Path, target: Path) -> Path:
        seen.append(names(tmp_path))
        done = rename(self, target)
        seen.append(names(tmp_path))
        return done

    monkeypatch.setattr(Path, "rename", spied)
    install_config(tmp_path, exclusive=True)
    remove_config(tmp_path)
    seen.append(names(tmp_path))
    assert len(seen) == 7
    assert all(any(n.endswith(".conflist") and not n.startswith(".") for n in listed) for listed in seen), seen


async def test_what_others_do_to_it_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "KEEP_INTERVAL", 0.01)
    install_config(tmp_path)
    task = asyncio.create_task(keep_config(tmp_path, exclusive=True))
    (tmp_path / CONF_NAME).unlink()
    (tmp_path / "00-a.conf").write_text("A")
    for _ in range(200):
        await asyncio.sleep(0.01)
        if names(tmp_path) == ["00-a.conf.fimbria_bak", CONF_NAME]:
            break
    assert names(tmp_path) == ["00-a.conf.fimbria_bak", CONF_NAME]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_what_keeps_the_runtime_from_using_ours(tmp_path: Path) -> None:
    assert config_problem(tmp_path) == f"{tmp_path / CONF_NAME} is missing"
    install_config(tmp_path)
    assert config_problem(tmp_path) == ""
    (tmp_path / "00-a.conf").write_text("A")
    assert config_problem(tmp_path) == ""  # one that calls ours, for all we know
    assert config_problem(tmp_path, exclusive=True) == f"{tmp_path} has 00-a.conf of other network plugins"
    assert config_problem(tmp_path / "none").startswith(f"{tmp_path / 'none'}")
