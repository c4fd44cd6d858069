"""The Prefect tasks of the pipeline, one file each."""
