"""The command timm-evovit. It is outside the package, whose import takes seconds, to answer Ctrl-C from the start."""
import os
import signal
import sys


def main() -> int:
    """Import the package, then run the command, and return the exit status."""
    def stop(*_: object) -> None:
        print('timm-evovit: interrupted', file=sys.stderr, flush=True)
        os._exit(130)  # what is imported may catch an exception

    before = signal.signal(signal.SIGINT, stop)
    from timm_evovit.tools.cli import main
    signal.signal(signal.SIGINT, before)
    return main()
