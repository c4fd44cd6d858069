"""Clients of a kshot server: `Client`, and `AsyncClient` for asyncio. They need httpx and nothing else."""

from kshot_client.client import Answer, AsyncClient, AsyncSpace, Client, Photo, Space
from kshot_client.errors import ClientError, RefusedError
from kshot_client.folders import Filling

__all__ = ["Answer", "AsyncClient", "AsyncSpace", "Client", "ClientError", "Filling", "Photo", "RefusedError", "Space"]
