"""`python -m tinybert_jax` is the `tinybert` command."""

import signal
import sys


def main() -> int:
    """Runs the command line; Ctrl-C ends the process without a traceback, early and late too."""
    handler = signal.getsignal(signal.SIGINT)
    is_default = handler is signal.default_int_handler  # not ignored, as in a job in the background
    if is_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tinybert_jax import cli

    try:
        signal.signal(signal.SIGINT, handler)
        return cli.main()
    except KeyboardInterrupt:
        print("tinybert: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if is_default:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
