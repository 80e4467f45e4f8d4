"""Plans of a run on machines that are not there: compiled ahead of time, or estimated from sizes."""
