"""`python -m inc_clusterq` is `inc-clusterq`."""

from __future__ import annotations

from inc_clusterq.cli import main

if __name__ == "__main__":
    main()
