"""Time per image of pretrained backbones, one thread on a CPU, with torch and with onnxruntime.

    python bench/backbone_speed.py [--rounds 7] [--batch 8]

CPU time, so that other load matters little; the backbones alternate within each round, and the median and
the middle half are printed. Freed memory is kept, as when kshot embeds a data set.
Weights are random, which does not affect the time. Writes bench/results/backbone_speed.json.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from kshot import malloc, plugins

RESULTS = Path(__file__).parent / "results" / "backbone_speed.json"
IMAGE = (3, 224, 224)
BACKBONES: list[tuple[str, dict[str, Any]]] = [
    ("efficientnet-lite0", {}),
    ("timm/mobilenetv4_conv_small", {"weights": "none", "size": 224}),
    ("timm/convnext_tiny", {"weights": "none", "size": 224}),
    ("timm/vit_small_patch14_dinov2", {"weights": "none", "size": 224}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.rand(options.batch, *IMAGE)
    subjects = [
        subject(name, settings, features, images) for name, settings in BACKBONES for features in ("last", "stages")
    ]
    with malloc.kept():
        for _ in range(options.rounds):
            for one in subjects:
                for engine in ("torch", "onnxruntime"):
                    started = time.process_time()
                    one[engine]()
                    one["times"][engine].append(1000 * (time.process_time() - started) / options.batch)
    rows = [row(one) for one in subjects]
    found = {
        "what": f"milliseconds of processor time an image of {IMAGE}, batches of {options.batch}, one thread, CPU",
        "machine": machine(),
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        "rounds": options.rounds,
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\n{found['what']}. Written to {RESULTS}")


def subject(name: str, settings: dict[str, Any], features: str, images: torch.Tensor) -> dict[str, Any]:
    provided = plugins.find().backbone(name).value
    backbone = provided(IMAGE, provided.Config(features=features, frozen=True, **settings)).eval()
    session = onnx_of(backbone, images)

    @torch.no_grad()
    def by_torch() -> torch.Tensor:
        return backbone(images)

    def by_onnxruntime() -> np.ndarray:
        return session.run(None, {"images": images.numpy()})[0]

    np.testing.assert_allclose(by_onnxruntime(), by_torch().numpy(), rtol=1e-3, atol=1e-3)
    return {
        "name": name, "features": features, "width": backbone.features,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "torch": by_torch, "onnxruntime": by_onnxruntime, "times": {"torch": [], "onnxruntime": []},
    }  # fmt: skip


def onnx_of(backbone: torch.nn.Module, images: torch.Tensor) -> onnxruntime.InferenceSession:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(backbone, (images,), None, dynamo=True, input_names=["images"], verbose=False).save(content)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(content.getvalue(), options, providers=["CPUExecutionProvider"])


def row(one: dict[str, Any]) -> dict[str, Any]:
    found = {key: one[key] for key in ("name", "features", "width", "parameters")}
    for engine, times in one["times"].items():
        low, median, high = np.percentile(times, [25, 50, 75])
        found[engine] = {"median": round(median, 1), "quarters": [round(low, 1), round(high, 1)]}
    print(
        f"{found['name']:32} {found['features']:7} {found['width']:6} features, "
        f"{found['parameters'] / 1e6:5.1f} M weights  "
        + "  ".join(f"{engine} {found[engine]['median']:6.1f} ms" for engine in one["times"]),
        flush=True,
    )
    return found


def machine() -> str:
    """The processor's name, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
