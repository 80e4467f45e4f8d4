"""Is an answer right: inside the program on tokens, and on the host on text."""
