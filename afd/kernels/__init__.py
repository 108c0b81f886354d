"""Native code that makes the exchanges of consecutive layers by itself."""
