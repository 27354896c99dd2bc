"""Which tests stay together in one process when several run side by side."""

from __future__ import annotations

import re

from xdist.scheduler import LoadScopeScheduling

MACHINE_WIDE = ("test_several_hosts.py", "test_slurm.py")
"""Tests that have a machine to themselves: network namespaces and daemons with names of their own."""


EACH_STORE = re.compile(r"\[(ministack|rgw)\b")
"""In the id of a test that runs against both stores (`each_store_url`)."""


class ByFile(LoadScopeScheduling):
    """Tests of a file share fixtures, so they stay together when others run beside them; on two stores, by store."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        store = EACH_STORE.search(nodeid)
        return "machine" if file.endswith(MACHINE_WIDE) else file + (store[0] if store else "")
