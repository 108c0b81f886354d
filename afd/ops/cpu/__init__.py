"""The native operations of the CPU: a C++ library (`src/`) and how Python calls it."""
