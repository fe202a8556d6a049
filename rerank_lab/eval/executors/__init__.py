"""Where the work of an evaluation is done: in this process, or on a Ray cluster."""
