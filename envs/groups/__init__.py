"""Which filters can only go together: channel labels, what operators do to them, finding and verifying groups."""
