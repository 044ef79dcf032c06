"""Downloads for a stranger: from public addresses only, so that nobody reaches this machine's network through it."""

import ipaddress


def is_public(address):
    """Whether an IP address (str) is one of the Internet, and not of a machine or its network."""
    return ipaddress.ip_address(address.partition("%")[0]).is_global


def only_public_adapter():
    """-> an adapter for `requests.Session.mount` whose connections are given up before anything is sent when the other
    side is no public address, whatever its name led to when it was looked up before. A proxy is asked as always: it
    looks names up itself."""
    from requests.adapters import HTTPAdapter
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class OnlyPublic:
        def _new_conn(self):
            connection = super()._new_conn()
            address = connection.getpeername()[0]
            if not is_public(address):
                connection.close()
                raise ValueError(f"could not be fetched ({self.host} is {address}, which is no public address)")
            return connection

    class Connection(OnlyPublic, HTTPConnection):
        pass

    class SecureConnection(OnlyPublic, HTTPSConnection):
        pass

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = SecureConnection

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args, **options):
            super().init_poolmanager(*args, **options)
            self.poolmanager.pool_classes_by_scheme = {"http": Pool, "https": SecurePool}

    return Adapter()
