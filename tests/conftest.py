"""What every test shares: one torch thread (small tensors are twenty times faster), and no telemetry."""

import torch

import kshot_flows  # noqa: F401  (first: it switches telemetry off)

torch.set_num_threads(1)
