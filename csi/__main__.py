"""`python -m csi` is `snode`."""

from csi.cli import main

if __name__ == "__main__":
    main()
