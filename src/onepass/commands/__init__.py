"""One module per command of the command line; each defines a click command called `command` and is imported when it is run."""
