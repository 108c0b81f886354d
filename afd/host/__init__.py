"""What this machine is: its cores, its memory, its open files. Knows nothing of a model or of a cluster."""
