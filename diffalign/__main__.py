"""`python -m diffalign` is the command `diffalign`."""

from .cli import main

raise SystemExit(main())
