"""`python -m bench` is the `bench` command."""

import sys

try:
    from bench.cli import main

    main()
except KeyboardInterrupt:  # during the import, or a second one while the first is answered
    sys.exit(130)
