"""SQL databases as resources, through SQLAlchemy."""

from txrpc.sql.resource import ResourceManager
from txrpc.sql.resource_aio import AsyncResourceManager

__all__ = ["AsyncResourceManager", "ResourceManager"]

ResourceManager.__module__ = AsyncResourceManager.__module__ = "txrpc.sql"  # what tracebacks say
