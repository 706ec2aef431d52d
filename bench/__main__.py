"""`python -m bench` is the `bench` command."""

import sys

try:
    from bench.cli import main

    main()
except KeyboardInterrupt:  # during the import: `main` lets it end the process
    sys.exit(130)
