"""The doors: one file a command, the only place where configuration meets objects."""
