import threading
from collections.abc import Callable

import structlog

from csi.background import Background, Readiness
from csi.deadline import Deadline, wait_until
from csi.errors import Unavailable


class Job:
    """Fails in the rounds named, and counts."""

    def __init__(self, **failures: Exception) -> None:
        self.rounds = 0
        self.failures = failures

    def __call__(self, deadline: Deadline) -> None:
        self.rounds += 1
        failure = self.failures.get(f"round{self.rounds}")
        if failure is not None:
            raise failure


def _after(rounds: int, job: Job) -> None:
    background = Background()
    background.every(0.001, "job", job)
    wait_until(lambda: job.rounds > rounds, Deadline.after(10), what="the job's rounds")
    background.stop()
    done = job.rounds
    threading.Event().wait(0.05)
    assert job.rounds == done, "stopped is stopped"


def test_a_job_goes_on_after_any_error() -> None:
    job = Job(round1=Unavailable("tgtd is down"), round2=ValueError("a defect"))
    with structlog.testing.capture_logs() as lines:
        _after(3, job)
    events = [(line["event"], line.get("error", "")) for line in lines]
    assert ("job failed, goes on", "Unavailable: tgtd is down") in events
    assert ("job failed, goes on", "ValueError: a defect") in events
    assert events[-1] == ("job works again", "")


def test_the_same_failure_is_logged_once() -> None:
    job = Job(**{f"round{at}": Unavailable("tgtd is down") for at in range(1, 20)})
    with structlog.testing.capture_logs() as lines:
        _after(20, job)
    assert len([line for line in lines if line["event"] == "job failed, goes on"]) == 1


def test_a_round_comes_early_when_it_is_asked_for() -> None:
    job, wanted, background = Job(), threading.Event(), Background()
    background.every(600, "job", job, early=wanted.is_set)
    wait_until(lambda: job.rounds == 1, Deadline.after(10), what="the first round")
    threading.Event().wait(0.2)
    assert job.rounds == 1
    wanted.set()
    wait_until(lambda: job.rounds > 1, Deadline.after(10), what="the early round")
    background.stop()


def test_a_round_that_fails_is_not_repeated_without_a_pause() -> None:
    job, background = Job(**{f"round{at}": Unavailable("tgtd is down") for at in range(1, 1000)}), Background()
    background.every(600, "job", job, early=lambda: True)
    threading.Event().wait(0.7)
    background.stop()
    assert 2 <= job.rounds <= 5


def _until(event: threading.Event) -> Callable[[Deadline], None]:
    def job(_deadline: Deadline) -> None:
        event.wait(30)

    return job


def test_a_job_that_hangs_does_not_hold_up_the_end() -> None:
    release = threading.Event()
    background = Background()
    background.every(1, "stuck", _until(release))
    background.stop(wait_seconds=0.05)
    release.set()


def test_a_job_sees_the_stop_in_its_deadline() -> None:
    seen: list[bool] = []

    def job(deadline: Deadline) -> None:
        deadline.sleep(30)
        seen.append(deadline.stopping)

    background = Background()
    background.every(1, "sleeper", job)
    background.stop(wait_seconds=5)
    assert seen == [True]


def test_a_check_that_fails_is_a_problem() -> None:
    def check(_deadline: Deadline) -> list[str]:
        raise Unavailable("vgs does not answer")

    readiness = Readiness([check, lambda _: ["the other"]])
    assert readiness.problems() is None
    readiness.look(Deadline.after(1))
    assert readiness.problems() == ["vgs does not answer", "the other"]


def test_a_good_result_is_kept_for_a_while_and_a_bad_one_is_not() -> None:
    answers = [["bad"], [], ["never asked"]]
    readiness = Readiness([lambda _: answers.pop(0)])
    for expected in (["bad"], [], []):
        readiness.look(Deadline.after(1))
        assert readiness.problems() == expected
    assert answers == [["never asked"]]
