"""`fimbria agent|observer|operator`: run a component. Its own parser says what it takes."""

from __future__ import annotations

import importlib
import sys

import click


def _component(name: str, help_: str) -> click.Command:
    @click.command(
        name,
        help=help_,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.argument("args", nargs=-1, type=click.UNPROCESSED)
    def run(args: tuple[str, ...]) -> None:
        from fimbria.startup import cheap_imports

        with cheap_imports():
            component = importlib.import_module(f"fimbria.{name}.main")
        sys.exit(component.main(list(args)))

    return run


agent = _component("agent", "Run the agent (one on every node).")
observer = _component("observer", "Run the observer (beside each agent).")
operator = _component("operator", "Run the operator (once per cluster).")
