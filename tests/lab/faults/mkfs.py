"""Counts the runs of mkfs in a guest, and kills them midway."""

from tests.lab.guest import Guest

_LOG, _LIMIT = "/run/mkfs.log", "/run/mkfs.limit"
# The driver looks for programs here before it looks in /usr/sbin.
_FOLDER = "/usr/local/sbin"
_PROGRAM = f"""#!/bin/bash
echo "${{0##*/}} $*" >> {_LOG}
real=/usr/sbin/${{0##*/}} device=${{@: -1}} limit=$(cat {_LIMIT})
case $limit in
"") exec $real "$@" ;;
superblock)
    $real "$@" &
    until head -c 4 $device | grep -q XFSB; do kill -0 $! || exit; blockdev --flushbufs $device; done
    kill -KILL $! $$ ;;
*) exec timeout -s KILL $limit $real "$@" ;;
esac
"""


class Mkfs:
    """Stands in front of mkfs.ext4, mkfs.xfs and mkfs.btrfs in a guest. It is gone when the guest loses its power."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        for fs_type in ("ext4", "xfs", "btrfs"):
            guest.write(f"{_FOLDER}/mkfs.{fs_type}", _PROGRAM, mode=0o755)
        guest.sh(f": > {_LOG}; : > {_LIMIT}")

    def calls(self) -> list[str]:
        """The command lines of all runs so far."""
        return self._guest.read(_LOG).splitlines()

    def kill_after(self, limit: float | str) -> None:
        """Kill -9 every run from now on: so many seconds after its start, or once a "superblock" of XFS is there.

        "": let them live.
        """
        text = limit if isinstance(limit, str) else f"{limit:.3f}"
        self._guest.sh(f"printf %s '{text}' > {_LIMIT}")
