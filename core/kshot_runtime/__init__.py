"""The ground floor that training and serving share: one image decode, the bundle's manifest, the bundle. No torch."""

import os

# onnxruntime reports home from its very import unless this is set first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
