"""A target has one account for its whole life: what is found otherwise goes as a whole, the accounts last."""

import pytest

from csi.exports.tgt_client import TgtClient
from csi.exports.tgt_show import parse_accounts, parse_names
from tests.unit.exports.conftest import NODE, Make, build_export, soon
from tests.unit.exports.daemons import LoginFailed, RealDaemon


@pytest.mark.parametrize("act", ["ensure", "reconcile", "remove"])
def test_a_target_with_other_accounts_is_removed_whole_and_made_anew(
    real_daemon: RealDaemon, make: Make, act: str
) -> None:
    client, publication, export = TgtClient(real_daemon.socket), make(), build_export(real_daemon)
    other = "n00000000000000ff"
    client.create_target(publication.tid, publication.target, soon())
    for user, secret in ((publication.chap.user, publication.chap.secret), (other, "another-secret-1")):
        client.create_account(user, secret, soon())
        client.bind_account(publication.tid, user, outgoing=False, deadline=soon())
    client.create_lun(publication.tid, 1, publication.device, soon())
    client.bind_initiator(publication.tid, NODE.initiator, soon())
    if act == "ensure":
        export.ensure(publication, soon())
    elif act == "reconcile":
        export.reconcile(lambda: [publication], soon())
    else:
        export.remove(publication, soon())
    wanted = [] if act == "remove" else [publication]
    assert real_daemon.process.poll() is None
    assert parse_names(client.show_names(soon())) == {p.tid: p.target for p in wanted}
    assert set(parse_accounts(client.show_accounts(soon()))) == {
        user for p in wanted for user in (p.chap.user, p.chap.mutual_user)
    }
    for p in wanted:
        with pytest.raises(LoginFailed):
            real_daemon.login(p, user=other, secret="another-secret-1")
        assert real_daemon.login(p).alive()
