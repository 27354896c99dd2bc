from tests.flows.conftest import command

__all__ = ["command"]
