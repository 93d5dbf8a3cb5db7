"""`python -m harness`: configuration in, record out."""

from harness.cli import main

if __name__ == "__main__":
    main()
