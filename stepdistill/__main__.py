"""``python -m stepdistill`` and ``accelerate launch -m stepdistill``: the command line."""

from stepdistill.cli.main import main

if __name__ == "__main__":
    main()
