"""Clients of a kshot server: `Client`, and `AsyncClient` for asyncio. They need httpx and nothing else.

>>> client = Client("http://127.0.0.1:8000")
>>> pets = client.space("pets")                        # found by its name, or made
>>> pets.add("cat", ["tom.jpg", "kitty.png"])          # usable at once
>>> pets.add("dog", ["rex.jpg"])
>>> pets.classify("mystery.jpg").name                  # None: none of these
>>> print(client.space("fruit").fill("fruit.zip"))     # a folder or zip, with a folder of photos for each class

`AsyncClient` has the same methods: `await client.space("pets")`.
"""

from kshot_client.blocking import Client, Space
from kshot_client.client import AsyncClient
from kshot_client.errors import ClientError, RefusedError
from kshot_client.folders import Filling
from kshot_client.photos import Photo
from kshot_client.space import Answer, AsyncSpace

__all__ = [
    "Answer", "AsyncClient", "AsyncSpace", "Client", "ClientError", "Filling", "Photo", "RefusedError", "Space",
]  # fmt: skip
