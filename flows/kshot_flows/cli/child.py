"""Entry point of child processes of a schedule: `python -m kshot_flows.cli.child PARENT run ID | server`."""

from kshot_flows.cli.errors import sentence
from kshot_flows.run import child

if __name__ == "__main__":
    child.main(sentence)
