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
        click.echo(f"fimbria prepare: {error.strerror or error}", err=True)
        sys.exit(1)
