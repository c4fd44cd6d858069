"""What each Prefect task of the pipeline does, a file for each."""
