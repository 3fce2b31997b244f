"""The program `cogvlm-hpe`; `python -m cogvlm_hpe …` is how launchers start a rank."""

from cogvlm_hpe import cli
from launcher import errors


def main() -> None:
    """Run the command line and end the process."""
    exit_code = cli.main()
    errors.end(exit_code)  # not before: what a command has imported may have put its own there


if __name__ == "__main__":
    main()
