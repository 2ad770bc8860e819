"""Taking a volume from a node that has fallen silent, where its user allowed it (the parameter `takeover`).

Pure functions. It is for orchestrators that notice no death themselves, such as Docker. Safe at any time, since the
SNODE fences the old holder first and whatever it acknowledged is on disk; but a holder that was alive after all loses
its volume. So it must have been silent long enough, and not together with all others: then the fault is at the SNODE's
own network.
"""

import re
from collections.abc import Mapping

from csi.errors import Invalid

PARAMETER = "takeover"
#: Both ends of a session ping each other every 5 s; less than two of them prove nothing.
LEAST_SECONDS = 10
MOST_SECONDS = 86_400
#: Nodes that were heard of last within so many seconds of each other have fallen silent together.
_TOGETHER_SECONDS = 10.0

_TIME = re.compile(r"([0-9]{1,5})(s|m|h)")
_UNITS = {"s": 1, "m": 60, "h": 3600}


def after_seconds(parameters: Mapping[str, str]) -> int:
    """How long a holder must have been silent; 0 = the volume is never taken over. Raises Invalid."""
    text = parameters.get(PARAMETER, "")
    if not text:
        return 0
    match = _TIME.fullmatch(text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        raise Invalid(f"parameters.{PARAMETER}: {text[:60]!a} is not a time from {LEAST_SECONDS}s to 24h, such as 15s")
    return seconds


def refusal(after: int, holder: str, idle_seconds: Mapping[str, float | None]) -> str:
    """Why the holder keeps the volume, or "" when it may be taken.

    idle_seconds: of every node that holds any volume, how long it has been silent; None = nothing can be said of it.
    """
    silent = idle_seconds.get(holder)
    if silent is None:
        return "whether it is alive can't be told yet; repeat in a few seconds"
    if silent < after:
        return f"it was heard of {silent:.0f} s ago, and the volume may be taken after {after} s of silence"
    others = {name: seconds for name, seconds in idle_seconds.items() if name != holder and seconds is not None}
    together = [name for name, seconds in others.items() if abs(seconds - silent) < _TOGETHER_SECONDS]
    if together and all(seconds >= LEAST_SECONDS for seconds in others.values()):
        return (
            f"it fell silent together with {', '.join(sorted(together))}, and no other node is heard of: the fault may "
            "be in the network of the SNODE. If the node is lost indeed, release the volume by hand"
        )
    return ""
