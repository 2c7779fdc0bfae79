"""SQL databases as resources, through SQLAlchemy."""

from typing import TYPE_CHECKING, Any

from txrpc.sql.resource import ResourceManager

if TYPE_CHECKING:
    from txrpc.sql.resource_async import AsyncResourceManager

__all__ = ["AsyncResourceManager", "ResourceManager"]

ResourceManager.__module__ = "txrpc.sql"  # what tracebacks say


def __getattr__(name: str) -> Any:
    """Import the asyncio half where it is first used: it needs greenlet, which a synchronous program does not install."""
    if name != "AsyncResourceManager":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from txrpc.sql.resource_async import AsyncResourceManager
    except ImportError as error:
        text = "txrpc.sql.AsyncResourceManager needs SQLAlchemy's asyncio half: pip install 'sqlalchemy[asyncio]'"
        raise ImportError(text, name="greenlet") from error
    AsyncResourceManager.__module__ = "txrpc.sql"
    globals()[name] = AsyncResourceManager
    return AsyncResourceManager


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
