"""What can go wrong with the lab itself, told apart from what goes wrong inside a guest."""


class LabError(Exception):
    """The lab cannot do what was asked: a tool is missing, a guest does not boot, a folder is not ours."""


class GuestGone(LabError):
    """The guest ended (power cut, panic, power off) before it answered."""


class CommandFailed(LabError):
    """A command in a guest ended with a code other than 0; `rc` and `out` hold the code and all of its output."""

    def __init__(self, guest: str, command: str, rc: int, out: str) -> None:
        super().__init__(f"{guest}: {command}\n-> {rc}\n{out}")
        self.guest, self.command, self.rc, self.out = guest, command, rc, out
