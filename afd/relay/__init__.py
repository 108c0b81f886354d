"""Many layers of a half in one native call, the exchanges between them included. See `runs`."""
