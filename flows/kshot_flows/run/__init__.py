"""Starting flows: from the command line, on a schedule, with an embedded or configured Prefect API."""
