"""How flows are started: from the command line, on a schedule, with an embedded API."""
