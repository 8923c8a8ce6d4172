"""Runs a command of this repository in a virtual machine with another kernel.

QEMU emulates the processor (no KVM). The guest sees the host's root file system, read-only under an overlay in its
memory: the repository, its virtual environment and Debian's packages are where they are on the host, and whatever it
writes is gone afterwards. It has no network but ``lo`` and what the command makes.
"""

import os
import secrets
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import initrd
import kernels

REPO = Path(__file__).resolve().parents[2]
BOOT_SECONDS = 120  # 3 are usual; on a loaded machine emulation can take ten times as long
_CONSOLE_BYTES = 16 * 1024  # of the guest's kernel log, kept for error messages
_VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
_CMDLINE = (
    "console=ttyS0 panic=-1 oops=panic quiet nokaslr mitigations=off tsc=reliable random.trust_cpu=1 "
    "nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
)

Echo = Callable[[bytes], object]


class MachineError(Exception):
    """The machine couldn't do its job, whatever the command is: a tool is missing or the guest crashed twice."""


class GuestTimeout(MachineError):
    """The command was still running at its time limit; `output` is what it had written."""

    def __init__(self, text: str, output: str) -> None:
        super().__init__(text)
        self.output = output


class _GuestCrash(Exception):
    """The guest ended, or never started, without saying how the command did."""


@dataclass(frozen=True)
class Result:
    """How a command ended: its exit code, its standard output and error as one text, and what it took."""

    rc: int
    output: str
    boot_seconds: float
    run_seconds: float
    attempts: int


def default_env() -> dict[str, str]:
    """The guest's environment: this repository's programs first, nothing of the host's environment."""
    path = f"{REPO}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb", "PYTHONUNBUFFERED": "1"}


def run(
    kernel: str,
    argv: Sequence[str],
    *,
    timeout: float = 300,
    env: Mapping[str, str] | None = None,
    memory: int = 1024,
    echo: Echo | None = None,
) -> Result:
    """Runs `argv` as root in the repository's directory, in a fresh guest with the kernel `kernel` (see kernels.get).

    `timeout` is in seconds from the moment the guest is up, `memory` in MB, `env` is added to default_env, `echo` is
    given the output in pieces as it comes. A guest that doesn't start or crashes is started once more: then the
    command begins anew. A command that fails isn't repeated; its exit code is in the result.

    Raises GuestTimeout when the command took too long, kernels.KernelError when there is no such kernel,
    initrd.InitrdError and MachineError when the machine can't be made or crashed twice.
    """
    found = kernels.get(kernel)
    mark = secrets.token_hex(8)
    settings = {"mark": mark, "repo": str(REPO), "modules": str(found.modules)}
    image = initrd.build(found, initrd.job(argv, REPO, {**default_env(), **(env or {})}), settings)
    for attempt in (1, 2):
        try:
            with _guest(found, image, memory) as guest:
                talk = Talk(mark, echo)
                _follow(guest, talk, timeout)
                return Result(talk.rc(), talk.text(), talk.booted - guest.started, talk.ended - talk.booted, attempt)
        except _GuestCrash as crash:
            if attempt == 2:
                raise MachineError(f"kernel {found.release}: {crash}") from None
            print(f"vm: kernel {found.release}: {crash}\nvm: trying once more", file=sys.stderr, flush=True)
    raise AssertionError("unreachable")


@dataclass
class Talk:
    """What the guest says on its port, taken apart: GUEST_READY, the command's output, GUEST_RC.

    Both lines carry a mark that only this run knows, so that no output is mistaken for them.
    """

    mark: str
    echo: Echo | None
    booted: float = 0.0
    ended: float = 0.0
    _pending: bytes = b""
    _output: bytearray = field(default_factory=bytearray)
    _code: int | None = None

    def feed(self, data: bytes, now: float) -> None:
        self._pending += data
        ready = f"{self.mark} GUEST_READY\n".encode()
        if not self.booted and self._pending.startswith(ready):
            self.booted = now
            self._pending = self._pending[len(ready) :]
        if self.booted and not self.done():
            self._take(now)

    def _take(self, now: float) -> None:
        line = f"\n{self.mark} GUEST_RC=".encode()
        output, found, rest = self._pending.partition(line)
        if not found:
            # What may be the beginning of the line that ends it all stays until more is known.
            kept = next((n for n in range(len(line) - 1, 0, -1) if output.endswith(line[:n])), 0)
            output, rest = output[: len(output) - kept], output[len(output) - kept :]
        self._pending = found + rest
        self._emit(output)
        if found and b"\n" in rest:
            self._code, self.ended = int(rest.partition(b"\n")[0]), now

    def flush(self) -> None:
        """Gives out what was kept back: the guest is gone and won't say more."""
        if self.booted:
            self._emit(self._pending)
        self._pending = b""

    def _emit(self, output: bytes) -> None:
        self._output += output
        if output and self.echo:
            self.echo(output)

    def done(self) -> bool:
        return self._code is not None

    def rc(self) -> int:
        assert self._code is not None
        return self._code

    def text(self) -> str:
        return self._output.decode(errors="replace")


@dataclass
class _Guest:
    """A running QEMU: its port (the command's output), its console (the kernel's words) and virtiofsd's log."""

    process: subprocess.Popen[bytes]
    port: socket.socket
    share_log: Path
    started: float
    _console: bytearray = field(default_factory=bytearray)

    def heard(self, data: bytes) -> None:
        self._console += data
        del self._console[:-_CONSOLE_BYTES]

    def last_words(self) -> str:
        console = self._console.decode(errors="replace").replace("\r", "").strip()
        share = self.share_log.read_text(errors="replace").strip()
        return f"its console said:\n{console or '(nothing)'}\nvirtiofsd said:\n{share or '(nothing)'}"


def _follow(guest: _Guest, talk: Talk, timeout: float) -> None:
    """Feeds `talk` until the command's end. Raises _GuestCrash or GuestTimeout."""
    console = guest.process.stdout
    assert console is not None
    with selectors.DefaultSelector() as selector:
        selector.register(guest.port, selectors.EVENT_READ)
        selector.register(console, selectors.EVENT_READ)
        while not talk.done():
            limit = talk.booted + timeout if talk.booted else guest.started + BOOT_SECONDS
            ready = selector.select(max(0.0, limit - time.monotonic()))
            if not ready:
                _late(guest, talk, timeout)
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fd == console.fileno():
                    guest.heard(data)
                else:
                    talk.feed(data, time.monotonic())
            if not selector.get_map() and not talk.done():
                talk.flush()
                state = "crashed while the command ran" if talk.booted else "didn't start"
                raise _GuestCrash(f"the guest {state}; {guest.last_words()}")


def _late(guest: _Guest, talk: Talk, timeout: float) -> None:
    if not talk.booted:
        raise _GuestCrash(f"the guest wasn't up after {BOOT_SECONDS} s; {guest.last_words()}")
    talk.flush()
    raise GuestTimeout(f"the command was still running after {timeout:g} s", talk.text())


@contextmanager
def _guest(kernel: kernels.Kernel, image: bytes, memory: int) -> Iterator[_Guest]:
    """Starts virtiofsd and QEMU; ends both and removes their files when left, however that is."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fimbria-vm-")))
        (directory / "initrd").write_bytes(image)
        port, far = (stack.enter_context(end) for end in socket.socketpair())
        _share(stack, directory)
        command = _qemu(kernel, directory, memory, far.fileno())
        started = time.monotonic()
        process = _start(stack, command, far.fileno(), subprocess.PIPE)
        far.close()
        yield _Guest(process, port, directory / "root.log", started)


def _share(stack: ExitStack, directory: Path) -> None:
    program = next((p for p in _VIRTIOFSD if os.access(p, os.X_OK)), None)
    if program is None:
        raise MachineError("virtiofsd isn't installed; run scripts/setup --test")
    with socket.socket(socket.AF_UNIX) as listener, (directory / "root.log").open("wb") as log:
        listener.bind(str(directory / "root.sock"))
        listener.listen(1)
        fd = listener.fileno()
        _start(stack, [sys.executable, str(Path(__file__).with_name("share.py")), str(fd), program], fd, log.fileno())


def _start(stack: ExitStack, command: list[str], fd: int, output: int) -> subprocess.Popen[bytes]:
    """A process that the stack ends, in a session of its own so that Ctrl-C reaches us and not it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=[fd],
        start_new_session=True,
    )
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def _qemu(kernel: kernels.Kernel, directory: Path, memory: int, port: int) -> list[str]:
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise MachineError("qemu-system-x86_64 isn't installed; run scripts/setup --test")
    # setpriv: if this process is killed outright, the machine dies with it.
    return [
        "setpriv", "--pdeathsig", "KILL", program,
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        # 5-level paging and cmpxchg16b of TCG crashed guests, and so did a second processor.
        "-accel", "tcg,tb-size=256", "-cpu", "max,-la57,-cx16", "-smp", "1", "-m", str(memory),
        "-object", f"memory-backend-memfd,id=memory,size={memory}M,share=on", "-numa", "node,memdev=memory",
        "-chardev", f"socket,id=root,path={directory / 'root.sock'}",
        "-device", "vhost-user-fs-pci,chardev=root,tag=root",
        "-chardev", f"socket,id=port,fd={port}",
        "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,name=fimbria",
        "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
        "-kernel", str(kernel.image), "-initrd", str(directory / "initrd"), "-append", _CMDLINE,
    ]  # fmt: skip
