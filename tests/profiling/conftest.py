from tests.frontend.conftest import device, servers

__all__ = ["device", "servers"]
