from tests.server.programs import connection, server

__all__ = ["connection", "server"]
