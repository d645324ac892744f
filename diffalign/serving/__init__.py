"""Reward server: `diffalign serve-reward`. It needs the extra `server`; docs/reward_server.md describes its protocol."""

try:
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the reward server needs {error.name}, which is not installed: pip install 'diffalign[server]'", name=error.name
    ) from error

from .application import Settings, application
from .launch import serve

__all__ = ["Settings", "application", "serve"]
