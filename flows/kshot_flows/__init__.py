"""The pipeline around kshot: DVC versions data, Prefect runs the steps, MLflow tracks runs and registers models."""

import os

# Most of these tools report home by default; each reads its switch when it is imported.
for _switch, _off in {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "KINETO_LOG_LEVEL": "6",  # of torch.profiler, which reports its start and stop on standard error
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",  # a server logs errors while it stops
}.items():
    os.environ.setdefault(_switch, _off)
