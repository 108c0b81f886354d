"""HTTP shapes: request bodies, checks, response and chunk formats, routes."""
