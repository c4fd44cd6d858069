"""Presentation of results: terminal output, reports, pictures, tables, and what is logged to MLflow and Prefect."""
