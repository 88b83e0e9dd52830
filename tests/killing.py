"""`rlhf` with a kill at a chosen moment: `python -m tests.killing MODULE:NAME NTH ARGUMENTS`.

SIGKILL comes before the n-th call of that, as from outside: nothing is flushed or cleaned up.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any


def kill_at(place: str, nth: int, instead: str = "") -> None:
    """Have the n-th call of `MODULE:NAME` or `MODULE:CLASS.METHOD`, from 1, end this process.

    Instead it may never return (`sleep`), or run $COMMAND in a shell and go on (`shell`).
    """
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    own: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and instead == "sleep":
            time.sleep(10**6)
        if calls == nth and instead == "shell":
            os.system(os.environ["COMMAND"])
        elif calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args, **kwargs)

    setattr(owner, name, call)


if __name__ == "__main__":
    instead = sys.argv[3] if sys.argv[3] in ("sleep", "shell") else ""
    kill_at(sys.argv[1], int(sys.argv[2]), instead)
    sys.argv = ["rlhf", *sys.argv[3 + bool(instead) :]]
    from stages.cli import main

    main()
