"""Plans of a run on machines that are not present: compiled ahead of time, or estimated from sizes."""
