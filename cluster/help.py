"""How help is laid out: every command's on one screen of 24 lines and 80 columns."""

from __future__ import annotations

import argparse
from collections.abc import Generator

EXAMPLE = """example:
  uniapl train configs/local.yaml run.steps=5    then: uniapl report runs/local"""
EXIT_STATUS = """exit status:
  0  done, or ended by SIGTERM             2  wrong input, or it cannot go on
  1  the answer is no, or a mistake here   130  ended by Ctrl-C"""


class OneScreen(argparse.RawDescriptionHelpFormatter):
    """Usage on one line, an option's argument once, no heading over what shows itself."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=79)

    def _format_usage(self, usage, actions, groups, prefix):  # type: ignore[no-untyped-def]  # (argparse's)
        positionals = [action for action in actions if not action.option_strings]
        words = [self._format_actions_usage(positionals, [])]
        words += [
            f"{action.option_strings[0]} {action.metavar or action.dest.upper()}"
            for action in actions
            if self._needed(action)
        ]
        words += ["[OPTION ...]"] if any(self._shown(action) for action in actions) else []
        return f"usage: {' '.join(filter(None, [self._prog, *words]))}\n\n"

    def _needed(self, action: argparse.Action) -> bool:
        return bool(action.option_strings) and action.required

    def _shown(self, action: argparse.Action) -> bool:
        return bool(action.option_strings) and action.help != argparse.SUPPRESS

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        if isinstance(action, argparse._SubParsersAction):  # without the line of its own metavar
            return text.partition("\n")[2]
        return text

    def _iter_indented_subactions(self, action: argparse.Action) -> Generator[argparse.Action, None, None]:
        """Not indented: they stand under their heading alone."""
        if isinstance(action, argparse._SubParsersAction):
            yield from action._get_subactions()


def lay_out(parser: argparse.ArgumentParser) -> None:
    """Give `parser` and all below it this layout; a command is described by its line in the list of commands."""
    parser.formatter_class = OneScreen
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            action.help = argparse.SUPPRESS
        if isinstance(action, argparse._SubParsersAction):
            for listed in action._choices_actions:
                below = action.choices[listed.dest]
                below.description = below.description or listed.help
                lay_out(below)
