"""Types of the functions that fixtures give to tests."""

from __future__ import annotations

from collections.abc import Callable

from shipreader.reader import Reader
from tests.support.processes import Ended
from train_and_ship.infra.objectstore import ObjectStore

Command = Callable[..., Ended]
"""`command`: run an installed command against the stack, in a process of its own."""
Ship = Callable[..., Ended]
"""`ship`: the command in this process, which starts no interpreter."""
Connect = Callable[..., ObjectStore]
"""`connect`: an object store from settings."""
MakeReader = Callable[..., Reader]
"""`make_reader`: a reader of the test's bucket."""
Versioned = Callable[[str], str]
"""`versioned`: an MLflow version that holds a release; its number."""
