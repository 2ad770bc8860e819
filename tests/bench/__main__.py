"""All benchmarks, and docs/benchmarks.md made of them: `make bench`.

.venv/bin/python -m tests.bench [--quick]

Give it the machine alone: it takes about ten minutes on two cores. `--quick` runs everything a little and prints the
page instead of writing it.
"""

import argparse
import time

from tests.bench import creates, data, page, restart, start, way
from tests.bench.page import Section
from tests.bench.relays import Relays
from tests.lab import Lab
from tests.lab.cluster import Cluster
from tests.lab.kernel import PROJECT

_PAGE = PROJECT / "docs" / "benchmarks.md"


def main() -> None:
    """Run all; targets that are missed do not make it fail, since the page says so."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one to two repetitions; print the page, write nothing")
    quick = parser.parse_args().quick
    load, relays, began = page.load(), Relays(), time.monotonic()
    sections: list[Section] = []

    def note(found: Section) -> None:
        sections.append(found)
        print(f"{time.monotonic() - began:5.0f} s  {found.title}", flush=True)
        for target in found.targets:
            print("         " + "  ".join(target.row()), flush=True)

    with Lab() as lab:
        cluster = Cluster(lab, log_level="info")
        note(way.way_section(way.Race(cluster, relays), 1 if quick else 9))
        note(way.loss_section(way.Race(cluster, relays), 1 if quick else 5))
        note(data.section(cluster, *((1, 1) if quick else (3, 2))))
        lab_text = relays.sentence(cluster.snode)
    with Lab() as lab:
        note(creates.section(creates.new_cluster(lab), Relays(), *((2, 10) if quick else (15, 100))))
    note(restart.section(*((100, 1) if quick else (500, 3))))
    note(start.section(1 if quick else 5))
    text = page.page(sections, relays=lab_text, load=load)
    if quick:
        print(text)
    else:
        _PAGE.write_text(text)


if __name__ == "__main__":
    main()
