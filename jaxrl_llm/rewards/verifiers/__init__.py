"""Verifiers of answers: on tokens inside the program, and on text on the host."""
