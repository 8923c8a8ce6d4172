"""``run.py --kernel 6.1 -- COMMAND ARGS...``: runs a command of this repository in a virtual machine.

Exits with the command's code; 124 when it ran into the time limit, 125 when the machine failed.
"""

import argparse
import signal
import sys

import initrd
import kernels
import machine


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.list:
        for kernel in kernels.cached():
            print(kernel.release, kernel.directory)
        return 0
    # An exit by exception, so that the machine is taken down.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        result = machine.run(
            arguments.kernel, arguments.command, timeout=arguments.timeout, memory=arguments.memory, echo=_echo
        )
    except machine.GuestTimeout as error:
        print(f"vm: {error}", file=sys.stderr)
        return 124
    except (machine.MachineError, initrd.InitrdError, kernels.KernelError) as error:
        print(f"vm: {error}", file=sys.stderr)
        return 125
    except KeyboardInterrupt:
        return 130
    took = f"up in {result.boot_seconds:.1f} s, ran {result.run_seconds:.1f} s"
    print(f"vm: kernel {arguments.kernel}: {took}, exit code {result.rc}", file=sys.stderr)
    return result.rc


def _echo(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description="Runs a command in a VM with another Debian kernel.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kernel", help="a series (6.1, 6.12) or a release (6.12.95+deb12-cloud-amd64)")
    what.add_argument("--list", action="store_true", help="show the kernels in the cache")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="limit of the command, in seconds")
    parser.add_argument("--memory", type=int, default=1024, metavar="MB", help="memory of the guest")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
