"""`fimbria prepare` and `fimbria cleanup`: a node before its first agent, and after its last."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.option(
    "--procfs", default="/proc", show_default=True, type=click.Path(path_type=Path),
    help="Proc file system of the node: its process 1 shows where to mount.",
)  # fmt: skip
@click.option("--mount-bpffs", type=click.Path(path_type=Path), help="Mount a BPF file system there if none is.")
@click.option("--mount-cgroup", type=click.Path(path_type=Path), help="Mount the cgroup v2 tree there if it isn't.")
@click.option("--cni-bin-dir", type=click.Path(path_type=Path), help="Put the CNI plugin there.")
def prepare(procfs: Path, mount_bpffs: Path | None, mount_cgroup: Path | None, cni_bin_dir: Path | None) -> None:
    """Prepare this node for its agent: file systems and the CNI plugin. Safe to repeat; the chart's init container.

    The CNI configuration, which lets pods start, is the agent's to write, once it can serve them.
    """
    from fimbria.agent.install import install_plugin
    from fimbria.agent.prepare import BPF, CGROUP2, mount_on_node

    wanted = [(path, kind) for path, kind in ((mount_bpffs, BPF), (mount_cgroup, CGROUP2)) if path is not None]
    try:
        if wanted:
            mounted = mount_on_node(procfs, wanted)
            for path, kind in wanted:
                click.echo(f"{kind.kind} at {path}: {'mounted' if path in mounted else 'there'}")
        if cni_bin_dir is not None:
            install_plugin(cni_bin_dir)
            click.echo(f"CNI plugin in {cni_bin_dir}")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        click.echo(f"fimbria prepare: {place}{error.strerror or error}", err=True)
        sys.exit(1)


@click.command()
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option(
    "--stay", is_flag=True, help="Then wait to be stopped, with /tmp/clean as the sign that all went: for a container."
)
@click.option(
    "--run-dir", default="/run/fimbria", show_default=True, type=click.Path(path_type=Path),
    help="The agent's folder of sockets and journal.",
)  # fmt: skip
@click.option(
    "--bpffs", default="/sys/fs/bpf", show_default=True, type=click.Path(path_type=Path),
    help="Where the BPF file system is.",
)  # fmt: skip
@click.option(
    "--cni-conf-dir", default="/etc/cni/net.d", show_default=True, type=click.Path(path_type=Path),
    help="Where the runtime looks for CNI configuration.",
)  # fmt: skip
@click.option(
    "--cni-bin-dir", default="/opt/cni/bin", show_default=True, type=click.Path(path_type=Path),
    help="Where it looks for CNI plugins.",
)  # fmt: skip
def cleanup(*, yes: bool, stay: bool, run_dir: Path, bpffs: Path, cni_conf_dir: Path, cni_bin_dir: Path) -> None:
    """Remove everything of Fimbria from this node: programs, maps, devices, routes, CNI plugin and configuration.

    Configurations of other plugins that were set aside come back. The agent must have stopped. Pods that Fimbria
    connected lose their network: restart them once another plugin is there.
    """
    from fimbria.agent.cleanup import AgentRuns, Cleanup

    if not yes:
        click.confirm("Pods of this node lose their network. Remove Fimbria?", abort=True)
    work = Cleanup(run_dir, bpffs, cni_conf_dir, cni_bin_dir)
    try:
        well = work.run()
    except AgentRuns as error:
        click.echo(f"fimbria cleanup: {error}", err=True)
        sys.exit(1)
    for line in work.done or ["nothing was left"]:
        click.echo(line)
    for line in work.failed:
        click.echo(f"fimbria cleanup: {line}", err=True)
    if stay and well:
        _wait()
    sys.exit(0 if well else 1)


def _wait() -> None:
    """Until SIGTERM."""
    import signal

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Path("/tmp/clean").touch()  # noqa: S108 the container's own
    while True:
        signal.pause()
