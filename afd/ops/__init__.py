"""What models compute with: one protocol (`ops.Ops`), its records, and an implementation for each kind of machine."""
