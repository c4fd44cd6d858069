"""The server that LitServe makes of a bundle and a state, for bench/serve_throughput.py.

python with_litserve.py BUNDLE STATE PORT WORKERS THREADS PHOTOS
"""

import base64
import sys
from itertools import chain
from typing import Any

import litserve

from kshot_runtime.bundle import Bundle, State

BATCH, WAIT_S = 32, 0.005


class Photos(litserve.LitAPI):
    """Photos in base64 in, names out; the photos of several requests in one run."""

    def __init__(self, bundle: str, state: str, threads: int, photos: int) -> None:
        requests = BATCH // photos
        super().__init__(max_batch_size=requests, batch_timeout=WAIT_S if requests > 1 else 0.0)
        self.paths, self.threads = (bundle, state), threads

    def setup(self, device: str) -> None:
        bundle, state = self.paths
        self.bundle, self.state = Bundle.open(bundle, threads=self.threads, arena=True), State.load(state)

    def decode_request(self, request):  # LitServe takes an annotation for a form's
        return list(self.bundle.images([base64.b64decode(photo) for photo in request["photos"]]))

    def batch(self, inputs: list[list[Any]]) -> list[list[Any]]:
        return inputs

    def predict(self, asked: Any) -> Any:
        if not (asked and isinstance(asked[0], list)):  # one request by itself
            return self.bundle.classify(self.state, asked).names
        names = iter(self.bundle.classify(self.state, list(chain.from_iterable(asked))).names)
        return [[next(names) for _ in photos] for photos in asked]

    def unbatch(self, output: list[list[str]]) -> list[list[str]]:
        return output

    def encode_response(self, output: list[str]) -> dict[str, Any]:
        return {"names": output}


if __name__ == "__main__":
    bundle, state, port, workers, threads, photos = sys.argv[1:]
    server = litserve.LitServer(
        Photos(bundle, state, int(threads), int(photos)), accelerator="cpu", workers_per_device=int(workers)
    )
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")
