"""`python -m tinybert_jax` is the `tinybert` command."""

import signal
import sys


def main() -> int:
    """Runs the command line; Ctrl-C while it is imported ends the process without a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not ignored, as in a job in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tinybert_jax import cli

    signal.signal(signal.SIGINT, handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
