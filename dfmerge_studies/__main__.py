"""`python -m dfmerge_studies`."""

from dfmerge_studies.cli.app import main

if __name__ == "__main__":
    main()
