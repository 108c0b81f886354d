"""The native operations of the CPU: a C++ library (`src/`: AVX-512, AVX2 or portable code) and how Python calls it."""
