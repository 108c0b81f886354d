"""`python -m stepmesh`: look at a host, try the transport, measure it. Works without any other part of the project."""

import sys

from stepmesh.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
