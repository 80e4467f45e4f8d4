"""Several reward components -> one reward."""
