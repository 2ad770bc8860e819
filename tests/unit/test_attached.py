"""What is attached by which publication."""

from pathlib import Path

import pytest

from csi.attached import Attached
from csi.errors import InUse
from csi.fs.mounts import Mounts
from csi.records import RecordStore
from csi.stage_records import StageRecords
from tests.fakes.iscsi import FakeIscsi
from tests.unit.snode import soon

pytestmark = pytest.mark.root  # device nodes

VOLUME = "v-" + "a" * 26


def test_what_an_earlier_publication_attached_is_shown_to_no_container(tmp_path: Path) -> None:
    iscsi = FakeIscsi(tmp_path)
    connector = iscsi.connector()
    attached = Attached(
        [connector], mounts=Mounts(iscsi.runner), records=StageRecords(RecordStore(tmp_path / "records"))
    )
    earlier = iscsi.publish(VOLUME)
    attached.check_generation(VOLUME, {"generation": earlier.generation})  # not attached: told elsewhere
    connector.connect(earlier, soon())
    attached.check_generation(VOLUME, {"generation": earlier.generation})
    attached.check_generation(VOLUME, {})
    with pytest.raises(InUse, match=r"by an earlier publication, .* unstage it"):
        attached.check_generation(VOLUME, {"generation": "0" * 16})
    connector.disconnect(VOLUME, soon())
    iscsi.close()
