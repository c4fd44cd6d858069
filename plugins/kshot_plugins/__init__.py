"""kshot's own learners, backbones and data sources, registered through entry points like any other plugin."""
