"""One file a command, and the command line that finds them."""
