from tests.distributed.conftest import host

__all__ = ["host"]
