"""For plugin authors: the project template, and running the conformance kit."""
