"""`python -m bigmodel`, the same as `bigmodel`."""

from bigmodel.cli import main

if __name__ == "__main__":
    main()
