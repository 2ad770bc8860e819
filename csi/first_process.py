"""Being process 1 of a container: no signal ends it that it has no handler for, and every orphan becomes its child.

So the driver goes on in a child, and process 1 does nothing but pass signals on and take in what has ended. A driver
that took in all itself would take exit codes away from those who wait for them.
"""

import os
import signal

_PASSED_ON = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
_divided = False


def divide() -> None:
    """Go on in a child if this is process 1, whose exit code is then the child's; do nothing otherwise.

    Call it before there are threads.
    """
    global _divided
    if os.getpid() != 1:
        return
    # Blocked signals wait for sigwait, so none is lost, whenever it comes.
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON | {signal.SIGCHLD})
    child = os.fork()
    if child:
        os._exit(_wait(child))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON | {signal.SIGCHLD})
    _divided = True


def divided() -> bool:
    """Whether process 1 is this driver's own."""
    return _divided or os.getpid() == 1


def _wait(child: int) -> int:
    """Exit code of the child, as a shell would say it; the container, with all that is left in it, ends with us."""
    while True:
        number = signal.sigwait(_PASSED_ON | {signal.SIGCHLD})
        if number == signal.SIGCHLD:
            code = _take_in(child)
            if code is not None:
                return code if code >= 0 else 128 - code
        else:
            os.kill(child, number)  # it is ours until we take it in, so the number is nobody else's


def _take_in(child: int) -> int | None:
    """Take in all that has ended. The exit code of `child` if that has."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
