"""How every program of this project ends: one clear line for the user, no traceback for the user's mistakes."""

import sys
from collections.abc import Callable

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_STOPPED = 85  # stopped on request and resumable: the batch script requeues on it


class UserError(Exception):
    """Something the user can mend. The message names the thing, the rule and the remedy in one line."""

    exit_code = EXIT_FAILURE


class UsageError(UserError):
    """A command line or config that cannot be meant: exit code 2."""

    exit_code = EXIT_USAGE


def _say(message: str, exit_code: int) -> None:
    print(message, file=sys.stderr)


leave = _say  # comm puts its own here once ranks depend on each other
end: Callable[[int], object] = sys.exit  # the last call of a program; comm puts its own here where gloo has threads


def run_main(program: str, main: Callable[[], int | None]) -> int:
    """Run `main` and turn a UserError into `program: error: …` on stderr and its exit code."""
    try:
        return main() or 0
    except UserError as error:
        leave(f"{program}: error: {error}", error.exit_code)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing is left to say
        return EXIT_FAILURE
