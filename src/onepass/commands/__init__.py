"""One module per command of the command line, imported when it is run; each defines a click command called `command`."""
