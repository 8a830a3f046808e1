"""One module per command of the command line, imported when it is run; each has a click command called `command`."""
